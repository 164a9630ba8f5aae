"""The part of a language model that prompt states need: its blocks up to the wanted one, and nothing behind it.

The blocks behind it and the output head are never read from disk. The block's output is taken by a hook, so it is the
raw residual stream whatever the model calls its final norm; with all blocks it is the model's own last state.

Legend: B batch, T tokens, P context tokens, H heads, D head width, W width.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from lidit.errors import InputError, one_line
from lidit.text.specs import EncoderSpec

# transformers' caches of a block that hold keys and values, or nothing (of a block that reads another one's)
SHAREABLE = ("DynamicLayer", "DynamicSlidingWindowLayer", "DummyLayer")


class Trunk:
    """A truncated model and the three ways of running it. All tensors are on `device`, states in the spec's dtype."""

    def __init__(self, spec: EncoderSpec, model: Any) -> None:
        """`model` has `spec.blocks` blocks already; `load` makes one from the spec's folder."""
        self.spec = spec
        self.model: Any = model
        self.device = next(model.parameters()).device
        self._output: torch.Tensor | None = None
        if not spec.final:
            block_list(self.model, spec.blocks)[-1].register_forward_hook(self._keep_output)
        if spec.kind == "unmasked":  # LLM2Vec's first step, arXiv 2404.05961
            self.model.config.is_causal = False
        self._check_direction()
        self._context: Any = None
        # Some models let later layers read an earlier layer's keys and values from the cache.
        self._release_keys = not getattr(self.model.config, "num_kv_shared_layers", 0)

    @classmethod
    def load(cls, spec: EncoderSpec, device: str) -> Trunk:
        """Read the blocks the spec needs. InputError where the folder lacks one of their tensors."""
        return cls(spec, _load(spec, torch.device(device)))

    def to(self, device: str | torch.device) -> None:
        """Moves the blocks and the context's keys and values."""
        self.model.to(device)
        self.device = next(self.model.parameters()).device
        for layer in [] if self._context is None else self._context.layers:
            if layer.keys is not None:
                layer.keys, layer.values = layer.keys.to(self.device), layer.values.to(self.device)

    @property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())

    def _keep_output(self, _module: nn.Module, _inputs: Any, output: Any) -> None:
        self._output = output[0] if isinstance(output, tuple) else output

    def _states(self, **inputs: Any) -> torch.Tensor:
        result = self.model(**inputs)
        if self.spec.final:
            last: torch.Tensor = result.last_hidden_state
            return last
        kept, self._output = self._output, None
        assert kept is not None
        return kept

    @torch.inference_mode()
    def _check_direction(self) -> None:
        """Run two tokens to see whether the first attends to the second.

        A shared prefix and unmasked padding are right for causal models only, and a config may be wrong.
        """
        if self.spec.kind == "encoder":
            return
        ids = torch.tensor([[5, 6], [5, 7]], device=self.device)
        states = self._states(input_ids=ids, use_cache=False)
        if states.shape != (2, 2, self.spec.width):
            raise InputError(
                f"encoder {self.spec.name}: {self.spec.folder}: a block of this {self.spec.model_type} "
                f"model gives {list(states.shape[2:])} values per token, expected {self.spec.width}; "
                "use layer: -1"
            )
        one, other = states[:, 0].float()
        sees = bool((one - other).norm() > 1e-3 * one.norm())
        if sees == (self.spec.kind == "unmasked"):
            return
        raise InputError(
            f"encoder {self.spec.name}: {self.spec.folder}: this {self.spec.model_type} model "
            + ("attends in both directions; use kind: encoder" if sees else "keeps its causal mask; use kind: causal")
        )

    @torch.inference_mode()
    def read_context(self, ids: torch.Tensor) -> torch.Tensor:
        """Run the context [1, P] once, keep its keys and values for `after_context`; returns its states [1, P, W].

        InputError where a block keeps anything else of what it has read.
        """
        from transformers import DynamicCache

        self._context = DynamicCache(config=self.model.config)
        del self._context.layers[self.spec.blocks :]  # the config is still the whole model's
        for layer in self._context.layers:
            if type(layer).__name__ not in SHAREABLE:  # what runs over it would change it for all other captions
                raise InputError(
                    f"encoder {self.spec.name}: {self.spec.folder}: blocks of this {self.spec.model_type} model keep "
                    f"more of a prefix than keys and values ({type(layer).__name__}); choose a model whose "
                    "blocks are all attention"
                )
        return self._states(input_ids=ids, past_key_values=self._context, use_cache=True)

    @torch.inference_mode()
    def after_context(self, ids: torch.Tensor) -> torch.Tensor:
        """States [B, T, W] of right-padded captions [B, T] behind the context.

        Needs no padding mask: a causal model never looks at what stands to the right, and padding only stands there.
        """
        cache = _shared_context(self._context, ids.shape[0], self._release_keys)
        return self._states(input_ids=ids, past_key_values=cache, use_cache=True)

    @torch.inference_mode()
    def whole(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """States [B, T, W] of right-padded sequences [B, T] with a boolean padding mask [B, T]."""
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask.long()}
        if self.spec.kind == "unmasked":
            inputs["use_cache"] = False
        return self._states(**inputs)


def _load(spec: EncoderSpec, device: torch.device) -> Any:
    from safetensors import SafetensorError
    from transformers import AutoConfig
    from transformers.utils import logging

    config = AutoConfig.from_pretrained(spec.folder, local_files_only=True, trust_remote_code=False)
    encoder = spec.kind == "encoder"
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # it would warn of the blocks that are left out on purpose
    try:
        model, report = _auto_class(config, spec).from_pretrained(
            spec.folder,
            config=config,
            dtype=getattr(torch, spec.dtype),
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            device_map=None if device.type == "cpu" else {"": device},
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = one_line(error, 300)
        raise InputError(f"encoder {spec.name}: {spec.folder}: the model cannot be loaded ({reason})") from None
    finally:
        logging.set_verbosity(verbosity)
    absent = sorted(report["missing_keys"]) + sorted(str(key) for key in report["mismatched_keys"])
    if absent:
        raise InputError(
            f"encoder {spec.name}: {spec.folder}: the weight files lack {len(absent)} tensors of the model, such as "
            f"{absent[0]}; fetch the model again"
        )
    part: Any = _text_part(model, encoder)
    return part.eval().requires_grad_(False)


def _auto_class(config: Any, spec: EncoderSpec) -> Any:
    """transformers' AutoModel for such a config; what it builds lacks the blocks behind the wanted one.

    They are taken out of the model, which has no storage yet when it is built, and not out of its config: fewer blocks
    there mean other blocks where a model counts from its end, forces the kind of its last one or packs them together.
    """
    from transformers import AutoModel, AutoModelForTextEncoding
    from transformers.models.auto.modeling_auto import MODEL_FOR_TEXT_ENCODING_MAPPING, MODEL_MAPPING

    encoder = spec.kind == "encoder"
    texts = encoder and type(config) in MODEL_FOR_TEXT_ENCODING_MAPPING
    auto, mapping = (AutoModelForTextEncoding, MODEL_FOR_TEXT_ENCODING_MAPPING) if texts else (AutoModel, MODEL_MAPPING)
    if spec.final or type(config) not in mapping:
        return auto
    found = mapping[type(config)]
    whole = found[0] if isinstance(found, tuple) else found

    def build(self: Any, *args: Any, **settings: Any) -> None:
        whole.__init__(self, *args, **settings)
        del block_list(_text_part(self, encoder), spec.total_blocks)[spec.blocks :]

    # Under the same names and module: that is how transformers looks up what else it knows about a class.
    cut = type(whole.__name__, (whole,), {"__init__": build, "__module__": whole.__module__})
    return type(auto.__name__, (auto,), {"_model_mapping": {type(config): cut}})


def _text_part(model: nn.Module, encoder: bool) -> nn.Module:
    """The language model inside a model that has other parts too."""
    names = ("text_model", "language_model") if encoder else ("language_model", "text_model")
    for name in names:
        part = getattr(model, name, None)
        if isinstance(part, nn.Module):
            return part
    return model


def block_list(model: nn.Module, blocks: int) -> nn.ModuleList:
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == blocks]
    if not lists:
        raise InputError(
            f"{type(model).__name__}: cannot find the list of {blocks} transformer blocks in this model, "
            "so inner layers cannot be read; use layer: -1"
        )
    return lists[0]  # modules() walks from the outside in


def _shared_context(context: Any, batch: int, release: bool) -> Any:
    """A cache that starts with the context for each of `batch` rows, without copying it."""
    cache = copy.copy(context)
    cache.layers = [_context_layer(layer, batch, release) for layer in context.layers]
    return cache


def _context_layer(layer: Any, batch: int, release: bool) -> Any:
    fresh = copy.copy(layer)
    if layer.keys is None:
        return fresh
    fresh.keys = layer.keys.expand(batch, -1, -1, -1)  # [1, H, P, D] -> [B, H, P, D], a view
    fresh.values = layer.values.expand(batch, -1, -1, -1)
    if release:
        # A block's keys and values of the whole batch would otherwise live until the last block has run.
        update = fresh.update

        def update_and_release(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
            keys, values = update(*args, **kwargs)
            # Fresh ones: an empty slice would keep the whole storage alive.
            fresh.keys = keys.new_empty((*keys.shape[:-2], 0, keys.shape[-1]))
            fresh.values = values.new_empty((*values.shape[:-2], 0, values.shape[-1]))
            return keys, values

        fresh.update = update_and_release
    return fresh
