"""Captions to LLM states: encoder spec, instruction prefix, tokens, batches, truncated trunk (paper
section 3.1).
"""

from lidit.text.encoder import CaptionStates, PromptEncoder, load_encoder
from lidit.text.packaged import packaged_model_folder
from lidit.text.specs import EncoderSpec, resolve_encoder
from lidit.text.tokenizer import CaptionTokens, PromptTokenizer

__all__ = [
    "CaptionStates",
    "CaptionTokens",
    "EncoderSpec",
    "PromptEncoder",
    "PromptTokenizer",
    "load_encoder",
    "packaged_model_folder",
    "resolve_encoder",
]
