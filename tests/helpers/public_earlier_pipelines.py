"""What the pipelines of earlier public systems make of captions, by CLIP, BERT and T5."""

from types import SimpleNamespace
from typing import Any

import torch

from lidit.text import PromptEncoder
from tests.helpers import public_models as tiny
from tests.helpers.public_pipelines import Answer, bare


def stable_diffusion(
    model: Any, tokens: Any, encoder: PromptEncoder, captions: list[str]
) -> Answer:
    pipe = bare("StableDiffusionPipeline", text_encoder=model, tokenizer=tokens)
    return {"prompt_embeds": pipe.encode_prompt(captions, "cpu", 1, False)[0]}


def _xl(captions: list[str], **parts: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """States of both encoders, side by side, and the vector of the second."""
    pipe = bare("StableDiffusionXLPipeline", **parts)
    found = pipe.encode_prompt(captions, device="cpu", do_classifier_free_guidance=False)
    return found[0], found[2]


def xl_clip_l(model: Any, tokens: Any, encoder: PromptEncoder, captions: list[str]) -> Answer:
    other, words = tiny.clip_text(projected=True), tiny.clip("!!")
    states, _ = _xl(
        captions, text_encoder=model, tokenizer=tokens, text_encoder_2=other, tokenizer_2=words
    )
    return {"states": states[..., : tiny.WIDTH]}


def xl_clip_g(model: Any, tokens: Any, encoder: PromptEncoder, captions: list[str]) -> Answer:
    other, words = tiny.clip_text(projected=False), tiny.clip()
    states, vectors = _xl(
        captions, text_encoder=other, tokenizer=words, text_encoder_2=model, tokenizer_2=tokens
    )
    return {"states": states[..., tiny.WIDTH :], "pooled": vectors}


def stable_cascade(model: Any, tokens: Any, encoder: PromptEncoder, captions: list[str]) -> Answer:
    pipe = bare("StableCascadePriorPipeline", text_encoder=model, tokenizer=tokens)
    states, vectors, *_ = pipe.encode_prompt("cpu", len(captions), 1, False, prompt=captions)
    return {"prompt_embeds": states, "prompt_embeds_pooled": vectors}


def hunyuan_dit_bert(
    model: Any, tokens: Any, encoder: PromptEncoder, captions: list[str]
) -> Answer:
    pipe = bare("HunyuanDiTPipeline", text_encoder=model, tokenizer=tokens)
    states, _, mask, _ = pipe.encode_prompt(
        captions, "cpu", torch.float32, do_classifier_free_guidance=False, text_encoder_index=0
    )
    return {"prompt_embeds": states, "prompt_attention_mask": mask}


def hunyuan_dit_t5(model: Any, tokens: Any, encoder: PromptEncoder, captions: list[str]) -> Answer:
    pipe = bare("HunyuanDiTPipeline", text_encoder_2=model, tokenizer_2=tokens)
    states, _, mask, _ = pipe.encode_prompt(
        captions, "cpu", torch.float32, do_classifier_free_guidance=False, text_encoder_index=1
    )
    return {"prompt_embeds_2": states, "prompt_attention_mask_2": mask}


def kandinsky3(model: Any, tokens: Any, encoder: PromptEncoder, captions: list[str]) -> Answer:
    pipe = bare("Kandinsky3Pipeline", text_encoder=model, tokenizer=tokens)
    states, _, mask, _ = pipe.encode_prompt(captions, False, device="cpu", _cut_context=True)
    longest = int(mask.sum(1).max())
    assert not states[:, longest:].any()  # its one token more is padding, which the mask hides
    return {"prompt_embeds": states[:, :longest], "attention_mask": mask[:, :longest]}


def latte(model: Any, tokens: Any, encoder: PromptEncoder, captions: list[str]) -> Answer:
    pipe = bare("LattePipeline", text_encoder=model, tokenizer=tokens)
    return {"prompt_embeds": pipe.encode_prompt(captions, False, device="cpu")[0]}


def bria(model: Any, tokens: Any, encoder: PromptEncoder, captions: list[str]) -> Answer:
    vae = torch.nn.Identity()  # of which the pipeline wants numbers
    vae.config = SimpleNamespace(shift_factor=0, block_out_channels=[1])
    # it asks for the dtype of its transformer
    parts = {"vae": vae, "transformer": model}
    pipe = bare("BriaPipeline", text_encoder=model, tokenizer=tokens, **parts)
    states, *_ = pipe.encode_prompt(captions, "cpu", do_classifier_free_guidance=False)
    return {"prompt_embeds": states}


def deepfloyd(model: Any, tokens: Any, encoder: PromptEncoder, captions: list[str]) -> Answer:
    pipe = bare("IFPipeline", text_encoder=model, tokenizer=tokens)
    return {"prompt_embeds": pipe.encode_prompt(captions, False, device="cpu")[0]}


def kandinsky22(model: Any, tokens: Any, encoder: PromptEncoder, captions: list[str]) -> Answer:
    pipe = bare("KandinskyV22PriorPipeline", text_encoder=model, tokenizer=tokens)
    vectors, states, mask = pipe._encode_prompt(captions, "cpu", 1, False)
    return {"states": states, "mask": mask, "pooled": vectors}
