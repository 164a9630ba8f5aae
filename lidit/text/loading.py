"""Loading the part of a language model that prompt states need, and nothing behind it.

The blocks behind the wanted one, a decoder behind an encoder, vision towers' blocks and output
heads are never read from disk, or are thrown away at once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lidit.errors import InputError, one_line
from lidit.text.specs import EncoderSpec


def load_model(spec: EncoderSpec, device: torch.device) -> tuple[Any, nn.Module | None]:
    """The text part of a spec's model with `spec.blocks` blocks, and the projection of its pooled
    output, if asked for.

    InputError where the folder lacks a tensor of them.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(spec.folder, local_files_only=True, trust_remote_code=False)
    encoder = spec.kind == "encoder"
    model, absent = _loaded(_auto_class(config, spec), config, spec, device)
    _check_whole([name for name in absent if not _needless(model, name, spec)], spec)
    projection = None
    if spec.reading.pooled == "text_embeds":
        projection = getattr(model, "text_projection", None)
        if not isinstance(projection, nn.Module):
            raise InputError(
                f"encoder {spec.name}: {spec.folder}: {spec.model_type}: this model projects no "
                "pooled output; set "
                "pooled: pooler_output, or leave it out"
            )
        projection = projection.eval().requires_grad_(False)
    part: Any = _text_part(model, encoder)
    return part.eval().requires_grad_(False), projection


def load_language_model(spec: EncoderSpec, device: torch.device) -> nn.Module:
    """A spec's whole model with its output head, for its answers. InputError where the folder lacks
    a tensor of it.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(spec.folder, local_files_only=True, trust_remote_code=False)
    model, absent = _loaded(AutoModelForCausalLM, config, spec, device)
    _check_whole(absent, spec)
    whole: nn.Module = model.eval().requires_grad_(False)
    return whole


def _loaded(
    auto: Any, config: Any, spec: EncoderSpec, device: torch.device
) -> tuple[Any, list[str]]:
    """What a class of transformers makes of the spec's folder, and the tensors that it did not find
    there.
    """
    from safetensors import SafetensorError
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # it would warn of the blocks that are left out on purpose
    try:
        model, report = auto.from_pretrained(
            spec.folder,
            config=config,
            dtype=getattr(torch, spec.dtype),
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            device_map=None if device.type == "cpu" else {"": device},
            output_loading_info=True,
        )
    except (
        OSError,
        ValueError,
        RuntimeError,
        AttributeError,
        KeyError,
        TypeError,
        SafetensorError,
    ) as error:
        reason = one_line(error, 300)
        raise InputError(
            f"encoder {spec.name}: {spec.folder}: the model cannot be loaded ({reason})"
        ) from None
    finally:
        logging.set_verbosity(verbosity)
    return model, sorted(report["missing_keys"]) + sorted(
        str(key) for key in report["mismatched_keys"]
    )


def _check_whole(absent: list[str], spec: EncoderSpec) -> None:
    if absent:
        raise InputError(
            f"encoder {spec.name}: {spec.folder}: the weight files lack {len(absent)} tensors "
            "of the model, such as "
            f"{absent[0]}; fetch the model again"
        )


def _needless(model: nn.Module, tensor: str, spec: EncoderSpec) -> bool:
    """Whether the states are right without a tensor in the files: many checkpoints lack such."""
    *modules, _ = tensor.split(".")
    if "pooler" in modules and spec.reading.pooled is None:  # it reads the states, and changes none
        return True
    if spec.kind == "encoder" and modules[:1] == ["decoder"] and model.config.is_encoder_decoder:  # type: ignore[union-attr]
        return True
    try:
        holder = type(model.get_submodule(".".join(modules))).__name__
    except AttributeError:
        return False
    return "Sinusoidal" in holder  # computed when the model is built, as Marian's positions


def _auto_class(config: Any, spec: EncoderSpec) -> Any:
    """transformers' AutoModel for such a config; what it builds lacks the blocks behind the wanted
    one.

    They are taken out of the model, which has no storage yet when it is built, and not out of its
    config: fewer blocks there mean other blocks where a model counts from its end, forces the kind
    of its last one or packs them together.
    """
    from transformers import (
        AutoModel,
        AutoModelForTextEncoding,
        CLIPTextConfig,
        CLIPTextModelWithProjection,
    )
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_TEXT_ENCODING_MAPPING,
        MODEL_MAPPING,
    )

    encoder = spec.kind == "encoder"
    if spec.reading.pooled == "text_embeds" and isinstance(config, CLIPTextConfig):
        return CLIPTextModelWithProjection  # no AutoModel stands for it
    texts = encoder and type(config) in MODEL_FOR_TEXT_ENCODING_MAPPING
    auto, mapping = (
        (AutoModelForTextEncoding, MODEL_FOR_TEXT_ENCODING_MAPPING)
        if texts
        else (AutoModel, MODEL_MAPPING)
    )
    if texts and config.is_encoder_decoder:
        # T5Gemma's class for its encoder asks for it, T5's sets it itself
        config.is_encoder_decoder = False
    halves = encoder and config.is_encoder_decoder
    if (spec.final and not halves) or type(config) not in mapping:
        return auto
    found = mapping[type(config)]
    whole = found[0] if isinstance(found, tuple) else found

    def build(self: Any, *args: Any, **settings: Any) -> None:
        whole.__init__(self, *args, **settings)
        if halves:  # nothing of the decoder's blocks is read, nor missed
            for blocks in (m for m in self.get_decoder().modules() if isinstance(m, nn.ModuleList)):
                del blocks[:]
        del block_list(_text_part(self, encoder), spec.total_blocks)[spec.blocks :]

    # Under the same names and module: that is how transformers looks up what else it knows about a
    # class.
    cut = type(whole.__name__, (whole,), {"__init__": build, "__module__": whole.__module__})
    return type(auto.__name__, (auto,), {"_model_mapping": {type(config): cut}})


def _text_part(model: nn.Module, encoder: bool) -> nn.Module:
    """The language model inside a model that has other parts too, without an output head."""
    if encoder and getattr(model.config, "is_encoder_decoder", False):
        half: nn.Module = model.get_encoder()  # type: ignore[operator]
        return half
    names = ("text_model", "language_model") if encoder else ("language_model", "text_model")
    for name in names:
        part = getattr(model, name, None)
        if isinstance(part, nn.Module):
            # some hold their language model with its output head
            head = getattr(part, "lm_head", None)
            inner = getattr(part, "base_model", None)
            return inner if head is not None and isinstance(inner, nn.Module) else part
    return model


def block_list(model: nn.Module, blocks: int) -> nn.ModuleList:
    """The model's list of that many transformer blocks. InputError where there is none."""
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == blocks]
    if not lists:
        raise InputError(
            f"{type(model).__name__}: cannot find the list of {blocks} transformer blocks in "
            "this model, "
            "so inner layers cannot be read; use layer: -1"
        )
    return lists[0]  # modules() walks from the outside in
