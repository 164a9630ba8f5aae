"""Tiny random text models of public text-to-image systems: their architectures, special tokens and
templates.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    BertConfig,
    BertModel,
    ByT5Tokenizer,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
    T5Gemma2Encoder,
    T5GemmaConfig,
    T5GemmaEncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)
from transformers.models.t5gemma2.configuration_t5gemma2 import T5Gemma2EncoderConfig

from tests.helpers.tiny_models import CORPUS

WIDTH = 32
SIGLIP = {  # a vision tower, of which texts need nothing
    "model_type": "siglip_vision_model",
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
WORDS = (
    *CORPUS,
    "You are an assistant designed to generate superior images with the superior degree of "
    "image-text alignment",
    "Describe the video by detailing the following aspects: the main content and theme of the "
    "video. user system",
)
CONTENT = "{{ m['content'] if m['content'] is string else m['content'][0]['text'] }}"
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n" + CONTENT + "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QWEN3 = CHATML.replace(
    "assistant\n{% endif %}",
    "assistant\n{% if enable_thinking is defined and enable_thinking is false "
    "%}<think>\n\n</think>\n\n{% endif %}"
    "{% endif %}",
)
QWEN2_VL = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant."
    "<|im_end|>\n{% endif %}" + CHATML
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}[SYSTEM_PROMPT]" + CONTENT
    + "[/SYSTEM_PROMPT]{% else %}[INST]" + CONTENT + "[/INST]{% endif %}{% endfor %}"
)  # fmt: skip
TEXT = {
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 4096,
}
ROPE = {
    "rope_type": "default",
    "rope_theta": 10000.0,
    "mrope_section": [1, 1, 2],
    "mrope_interleaved": True,
}
VISION = {
    "depth": 1,
    "hidden_size": 16,
    "out_hidden_size": WIDTH,
    "num_heads": 2,
    "intermediate_size": 16,
}


def tokenizer(specials: tuple[str, ...], **options: Any) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with a system's special tokens. around: its own first and last tokens
    of every text.
    """
    around = options.pop("around", ((), ()))
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=list(specials),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    backend.train_from_iterator(WORDS, trainer)
    if any(around):
        backend.post_processor = processors.TemplateProcessing(
            single=" ".join([*around[0], "$A", *around[1]]),
            special_tokens=[(token, specials.index(token)) for token in {*around[0], *around[1]}],
        )
    template = options.pop("chat_template", None)
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend, **{"model_max_length": 4096, **options}
    )
    made.chat_template = template
    return made


def qwen(template: str = CHATML, **options: Any) -> PreTrainedTokenizerFast:
    specials = (
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
        "<|image_pad|>",
        "<|vision_start|>",
        "<|vision_end|>",
    )
    return tokenizer(
        specials,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=template,
        **options,
    )


def llama3() -> PreTrainedTokenizerFast:
    specials = (
        "<|begin_of_text|>",
        "<|eot_id|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|pad|>",
    )
    names = {"bos_token": specials[0], "eos_token": specials[1], "pad_token": specials[4]}
    return tokenizer(specials, around=(specials[:1], ()), **names)


def mistral(side: str) -> PreTrainedTokenizerFast:
    specials = (
        "<pad>",
        "<s>",
        "</s>",
        "[INST]",
        "[/INST]",
        "[SYSTEM_PROMPT]",
        "[/SYSTEM_PROMPT]",
        "[IMG]",
    )
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    return tokenizer(
        specials, around=(("<s>",), ()), padding_side=side, chat_template=MISTRAL, **names
    )


def gemma() -> PreTrainedTokenizerFast:
    names = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
    return tokenizer(
        ("<pad>", "<eos>", "<bos>", "<image_soft_token>"), around=(("<bos>",), ()), **names
    )


def glm() -> PreTrainedTokenizerFast:
    specials = ("<|endoftext|>", "[gMASK]", "<sop>", "<eop>")
    return tokenizer(
        specials, around=(("[gMASK]", "<sop>"), ()), eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        padding_side="left",
    )  # fmt: skip


def smollm3() -> PreTrainedTokenizerFast:
    return tokenizer(
        ("<|end_of_text|>", "<|im_end|>"), eos_token="<|im_end|>", pad_token="<|im_end|>"
    )


def t5(**options: Any) -> PreTrainedTokenizerFast:
    return tokenizer(
        ("<pad>", "</s>", "<unk>"),
        around=((), ("</s>",)),
        eos_token="</s>",
        pad_token="<pad>",
        **options,
    )


def clip(pad: str = "<|endoftext|>", longest: int = 77) -> PreTrainedTokenizerFast:
    specials = ("!!", "<|startoftext|>", "<|endoftext|>")
    return tokenizer(
        specials, around=(specials[1:2], specials[2:]), bos_token=specials[1],
        eos_token=specials[2], pad_token=pad,
        model_max_length=longest,
    )  # fmt: skip


def bert_words() -> PreTrainedTokenizerFast:
    return tokenizer(
        ("[PAD]", "[UNK]", "[CLS]", "[SEP]"), around=(("[CLS]",), ("[SEP]",)), cls_token="[CLS]",
        sep_token="[SEP]", pad_token="[PAD]",
    )  # fmt: skip


def lively(model: torch.nn.Module) -> torch.nn.Module:
    """The same, with weights so large that everything matters."""
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2:
            torch.nn.init.normal_(parameter, std=0.15)
        elif "norm" not in name.lower():
            torch.nn.init.normal_(parameter, std=0.1)
        else:
            torch.nn.init.normal_(parameter, mean=1.0, std=0.1)
    return model.float().eval()


def decoder(family: str, blocks: int, words: int = 1024, **shape: Any) -> torch.nn.Module:
    config = AutoConfig.for_model(
        family, **{**TEXT, "num_hidden_layers": blocks, "vocab_size": words, **shape}
    )
    return lively(AutoModelForCausalLM.from_config(config))


def trunk(family: str, blocks: int, **shape: Any) -> torch.nn.Module:
    """A decoder without its head."""
    config = AutoConfig.for_model(
        family, **{**TEXT, "num_hidden_layers": blocks, "vocab_size": 1024, **shape}
    )
    return lively(AutoModel.from_config(config))


def multimodal(family: str, blocks: int, body: bool = False) -> torch.nn.Module:
    """A vision-language model; body: without its head."""
    text = {**TEXT, "num_hidden_layers": blocks, "vocab_size": 1024}
    if family in ("qwen2_vl", "qwen2_5_vl"):
        text = {k: v for k, v in text.items() if k != "head_dim"} | {
            "rope_scaling": {"type": "mrope", "rope_type": "default", "mrope_section": [1, 1, 2]}
        }
        vision = {**VISION, "fullatt_block_indexes": [0]}
        if family == "qwen2_vl":
            vision = {"depth": 1, "embed_dim": 16, "hidden_size": WIDTH, "num_heads": 2}
        numbers = {
            "image_token_id": 3,
            "vision_start_token_id": 4,
            "vision_end_token_id": 5,
            "video_token_id": 1000,
        }
    elif family == "qwen3_vl":
        text = text | {"rope_scaling": ROPE, "rope_parameters": ROPE}
        vision = {**VISION, "deepstack_visual_indexes": [0], "num_position_embeddings": 16}
        numbers = {
            "image_token_id": 3,
            "vision_start_token_id": 4,
            "vision_end_token_id": 5,
            "video_token_id": 1000,
        }
    elif family == "mistral3":
        text = text | {"model_type": "mistral", "sliding_window": None}
        vision = {
            "model_type": "pixtral",
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 32,
            "patch_size": 16,
        }
        numbers = {"image_token_index": 7}
    else:
        text = text | {"sliding_window": 16, "query_pre_attn_scalar": 8}
        vision = SIGLIP
        numbers = {
            "mm_tokens_per_image": 4,
            "image_token_index": 3,
            "boi_token_index": 1000,
            "eoi_token_index": 1001,
        }
    config = AutoConfig.for_model(family, text_config=text, vision_config=vision, **numbers)
    auto = AutoModel if body else AutoModelForImageTextToText
    return lively(auto.from_config(config))


def t5_encoder(umt5: bool = False, words: int = 1024) -> torch.nn.Module:
    shape = {
        "vocab_size": words, "d_model": WIDTH, "d_kv": 8, "d_ff": 48, "num_layers": 4,
        "num_heads": 4,
        "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0,
    }  # fmt: skip
    return lively(
        UMT5EncoderModel(UMT5Config(**shape)) if umt5 else T5EncoderModel(T5Config(**shape))
    )


def clip_text(projected: bool, longest: int = 77) -> torch.nn.Module:
    config = CLIPTextConfig(
        vocab_size=1024, hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=longest, projection_dim=16, bos_token_id=1, eos_token_id=2,
        pad_token_id=2,
    )  # fmt: skip
    return lively(CLIPTextModelWithProjection(config) if projected else CLIPTextModel(config))


def bert() -> torch.nn.Module:
    config = BertConfig(
        vocab_size=1024, hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=4,
        num_attention_heads=4, max_position_embeddings=128,
    )  # fmt: skip
    return lively(BertModel(config))


def t5gemma2() -> torch.nn.Module:
    text = {
        **TEXT,
        "num_hidden_layers": 4,
        "vocab_size": 1024,
        "sliding_window": 16,
        "query_pre_attn_scalar": 8,
    }
    text |= {"dropout_rate": 0.0, "attention_dropout": 0.0}
    config = T5Gemma2EncoderConfig(text_config=text, vision_config=SIGLIP, mm_tokens_per_image=4)
    return lively(T5Gemma2Encoder(config))


def t5gemma() -> torch.nn.Module:
    half = {
        **TEXT,
        "num_hidden_layers": 4,
        "vocab_size": 1024,
        "sliding_window": 16,
        "query_pre_attn_scalar": 8,
    }
    config = T5GemmaConfig(encoder=half, decoder=half, is_encoder_decoder=False)
    return lively(T5GemmaEncoderModel(config))


def byt5() -> Any:
    return ByT5Tokenizer()


def saved(folder: Path, model: torch.nn.Module, tokens: Any) -> Path:
    """A folder as users have it."""
    model.save_pretrained(folder)
    tokens.save_pretrained(folder)
    return folder


Build = Callable[[], tuple[torch.nn.Module, Any]]


class Processor:
    """A processor of a vision-language model that is given texts alone; the real ones need
    pictures' packages.
    """

    def __init__(self, tokens: Any) -> None:
        self.tokenizer = tokens
        self.decode = tokens.decode

    def apply_chat_template(self, messages: Any, **options: Any) -> Any:
        found = self.tokenizer.apply_chat_template(messages, **options)
        return [found] if options.get("tokenize") else found

    def __call__(self, text: Any, images: Any = None, videos: Any = None, **options: Any) -> Any:
        assert images is None
        assert videos is None
        return self.tokenizer(text, **options)
