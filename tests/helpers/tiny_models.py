"""Tiny random language models with their tokenizers, as ordinary Hugging Face folders.

No download, milliseconds to run. Every family has its own habits: some tokenizers prepend BOS and
some do not, some pad on the left, some models have sliding windows (16 tokens here) or mix them
with full attention.
"""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

WINDOW = 16
LAYERS = 6
CAUSAL_FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3", "phi3", "gpt_neox")
ENCODER_FAMILIES = ("bert", "t5", "clip", "clip_text")
VISION_FAMILIES = ("llava", "gemma3_vision")
PREPENDS_BOS = ("llama", "mistral", "gemma2", "gemma3", "llava", "gemma3_vision")
PADS_LEFT = ("gemma2", "gemma3")
CHATML = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' "
    "%}<|im_start|>system\n"
    "You are a default assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n{{ "
    "message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIALS = ("<unk>", "<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>", "<image>")
CORPUS = (
    "a red circle and a blue square on a green field",
    "Describe the image by detailing the color, shape, size, texture, quantity, text, and "
    "spatial relationships",
    "two yellow triangles left of a large white star, photographed in the evening light",
    "ein großer Würfel",
    "一个红色的圆形和一个蓝色的正方形",
)


def tiny_llm(
    folder: Path, family: str = "llama", layers: int = LAYERS, width: int = 64, seed: int = 0
) -> Path:
    """Write a random model of `family` and a byte-level BPE tokenizer into `folder`; returns the
    folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = tiny_tokenizer(family)
    torch.manual_seed(seed)
    model = _build(family, len(tokenizer), layers, width)
    # the default initialisation is so small that nothing matters
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2:
            torch.nn.init.normal_(parameter, std=0.15)
        elif "norm" in name.lower():
            torch.nn.init.normal_(
                parameter, mean=0.0 if family.startswith("gemma") else 1.0, std=0.2
            )
        else:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def tiny_tokenizer(family: str) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=list(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    backend.train_from_iterator(CORPUS, trainer)
    if family in PREPENDS_BOS:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 1)]
        )
    elif family in ("bert", "clip", "clip_text"):
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
        )
    elif family == "t5":
        backend.post_processor = processors.TemplateProcessing(
            single="$A </s>", special_tokens=[("</s>", 2)]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        padding_side="left" if family in PADS_LEFT else "right",
        model_max_length=48 if family.startswith("clip") else 512,
    )
    if family in ("llama", "qwen2", "qwen3"):
        tokenizer.chat_template = CHATML
    return tokenizer


def _build(family: str, vocabulary: int, layers: int, width: int) -> torch.nn.Module:
    shape = {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 3,
    }
    grouped = {**shape, "num_key_value_heads": 2, "head_dim": width // 4}
    if family == "llama":
        return LlamaForCausalLM(LlamaConfig(**grouped))
    if family == "qwen2":
        return Qwen2ForCausalLM(
            Qwen2Config(**{k: v for k, v in grouped.items() if k != "head_dim"})
        )
    if family == "qwen3":
        return Qwen3ForCausalLM(Qwen3Config(**grouped))
    if family == "mistral":
        return MistralForCausalLM(MistralConfig(**grouped, sliding_window=WINDOW))
    if family == "gemma2":
        return Gemma2ForCausalLM(
            Gemma2Config(**grouped, sliding_window=WINDOW, query_pre_attn_scalar=width // 4)
        )
    if family == "gemma3":
        return Gemma3ForCausalLM(_gemma3_text(grouped, width))
    if family == "phi3":
        return Phi3ForCausalLM(Phi3Config(**{k: v for k, v in grouped.items() if k != "head_dim"}))
    if family == "gpt_neox":
        return GPTNeoXForCausalLM(GPTNeoXConfig(**shape))
    if family == "bert":
        return BertModel(BertConfig(**shape))
    if family == "t5":
        return T5ForConditionalGeneration(
            T5Config(
                vocab_size=vocabulary,
                d_model=width,
                d_kv=width // 4,
                d_ff=2 * width,
                num_layers=layers,
                num_decoder_layers=1,
                num_heads=4,
                pad_token_id=3,
                eos_token_id=2,
                decoder_start_token_id=3,
            )
        )
    text = {**shape, "max_position_embeddings": 48}
    if family == "clip_text":
        return CLIPTextModel(CLIPTextConfig(**text))
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 8,
    }
    if family == "clip":
        return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))
    if family == "llava":
        config = LlavaConfig(
            text_config={**grouped, "model_type": "llama"},
            vision_config={**vision, "model_type": "clip_vision_model"},
            image_token_index=SPECIALS.index("<image>"),
        )
        return LlavaForConditionalGeneration(config)
    if family == "gemma3_vision":
        vision = {**vision, "model_type": "siglip_vision_model", "image_size": 32}
        return Gemma3ForConditionalGeneration(
            Gemma3Config(
                text_config=_gemma3_text(grouped, width),
                vision_config=vision,
                mm_tokens_per_image=4,
            )
        )
    raise ValueError(f"no tiny model of family {family!r}")


def _gemma3_text(grouped: dict[str, int], width: int) -> Gemma3TextConfig:
    kinds = [
        ("full_attention" if i % 3 == 2 else "sliding_attention")
        for i in range(grouped["num_hidden_layers"])
    ]
    return Gemma3TextConfig(
        **grouped, sliding_window=WINDOW, layer_types=kinds, query_pre_attn_scalar=width // 4
    )


def break_weights(folder: Path) -> None:
    """Take one tensor out of the weight file, as an interrupted conversion would."""
    from safetensors.torch import load_file, save_file

    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors.pop(next(name for name in tensors if "layers.0" in name))
    save_file(tensors, file, metadata={"format": "pt"})


def edit_config(folder: Path, **changes: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
