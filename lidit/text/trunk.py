"""The part of a language model that prompt states need: its blocks up to the wanted one, and
nothing behind it.

The blocks behind it and the output head are never read from disk. The block's output is taken by a
hook, so it is the raw residual stream whatever the model calls its final norm; with all blocks it
is the model's own last state.

Legend: B batch, T tokens, C or P context tokens, H heads, D head width, W width, X width of pooled
vectors.
"""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from lidit.errors import InputError, one_line
from lidit.text.joining import join_layers
from lidit.text.loading import block_list, load_model
from lidit.text.packed import Packing, packed
from lidit.text.specs import EncoderSpec

log = logging.getLogger(__name__)

# of nn.Embedding modules, such as embed_positions
POSITION_TABLE = re.compile(r"(^|\.)(wpe|\w*position\w*)$")
# What a model's own code raises where it cannot run as it is asked to: cut, without pixels, with
# this cache.
REFUSALS = (
    AttributeError, IndexError, ValueError, RuntimeError, AssertionError, TypeError, KeyError,
    NotImplementedError,
)  # fmt: skip
# transformers' caches of a block that hold keys and values, or nothing (of a block that reads
# another one's)
SHAREABLE = ("DynamicLayer", "DynamicSlidingWindowLayer", "DummyLayer")
PACKING_TRIAL = ((5, 6, 7, 8, 9), (6,), (7, 5, 8))  # token ids of three captions
PACKING_TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2}  # rounding alone stays below a tenth of it


class Trunk:
    """A truncated model and the ways of running it. All tensors are on `device`, states in the
    spec's dtype.

    packs: captions behind a context run without padding, by `after_context_packed`.

    pooled: [B, X] of the last run, for specs that ask for it.
    """

    def __init__(self, spec: EncoderSpec, model: Any, projection: nn.Module | None = None) -> None:
        """`model` has `spec.blocks` blocks already; `load` makes one from the spec's folder."""
        self.spec = spec
        self.model: Any = model
        self.projection = projection
        self.pooled: torch.Tensor | None = None
        self.device = next(model.parameters()).device
        self._outputs: dict[int, torch.Tensor] = {}
        self._keep_outputs()
        if spec.kind == "unmasked":  # LLM2Vec's first step, arXiv 2404.05961
            self.model.config.is_causal = False
        self._try()
        self._context: Any = None
        self._context_tokens = 0
        self.packs = False
        # Some models let later layers read an earlier layer's keys and values from the cache.
        self._release_keys = not getattr(
            getattr(self.model, "config", None), "num_kv_shared_layers", 0
        )

    @classmethod
    def load(cls, spec: EncoderSpec, device: str) -> Trunk:
        """Read the blocks the spec needs. InputError where the folder lacks one of
        their tensors.
        """
        return cls(spec, *load_model(spec, torch.device(device)))

    def to(self, device: str | torch.device) -> None:
        """Moves the blocks and the context's keys and values."""
        self.model.to(device)
        if self.projection is not None:
            self.projection.to(device)
        self.device = next(self.model.parameters()).device
        # a CPU would compare every token with every other
        self.packs = self.packs and self.device.type == "cuda"
        for layer in [] if self._context is None else self._context.layers:
            if layer.keys is not None:
                layer.keys, layer.values = layer.keys.to(self.device), layer.values.to(self.device)

    @property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())

    def _keep_outputs(self) -> None:
        """Hooks that note what the wanted blocks give, and what the first one reads."""
        wanted = {layer for layer in self.spec.layers if layer != self._normed}
        if not wanted:
            return
        blocks = block_list(self.model, self.spec.blocks)
        if 1 in wanted and getattr(getattr(self.model, "encoder", None), "conv", None) is not None:
            # DeBERTa-v2's: what the second block reads is not what the first one gives.
            raise self._refusal(
                "a convolution follows the first block", "choose layer: 2 or higher, or layer: -1"
            )
        for layer in wanted:
            if layer == 0:
                blocks[0].register_forward_pre_hook(self._keep_input, with_kwargs=True)
            else:
                blocks[layer - 1].register_forward_hook(partial(self._keep_output, layer))

    @property
    def _normed(self) -> int | None:
        """The block whose output is the model's own last state, behind the final norm."""
        return self.spec.total_blocks if self.spec.reading.final_norm else None

    def _keep_output(self, layer: int, _module: nn.Module, _inputs: Any, output: Any) -> None:
        self._outputs[layer] = output[0] if isinstance(output, tuple | list) else output

    def _keep_input(self, _module: nn.Module, inputs: Any, named: dict[str, Any]) -> None:
        self._outputs[0] = inputs[0] if inputs else named["hidden_states"]

    def _states(self, **inputs: Any) -> torch.Tensor:
        result = self.model(**inputs)
        kept, self._outputs = self._outputs, {}
        if self._normed is not None and self.spec.final:
            kept[self._normed] = result.last_hidden_state
        if self.spec.reading.pooled:
            pooled: torch.Tensor = result.pooler_output
            self.pooled = pooled if self.projection is None else self.projection(pooled)
        if self.spec.reading.layers is None:
            return self._tensor(kept[self.spec.blocks])
        states = [self._tensor(kept[layer]) for layer in self.spec.layers]
        return join_layers(states, self.spec.reading)

    @staticmethod
    def _tensor(output: Any) -> torch.Tensor:
        assert isinstance(output, torch.Tensor), "the block gives no tensor"
        return output

    def _refusal(self, reason: str, remedy: str) -> InputError:
        spec = self.spec
        return InputError(
            f"encoder {spec.name}: {spec.folder}: {spec.model_type}: {reason}; {remedy}"
        )

    @property
    def _elsewhere(self) -> str:
        """What to choose where a model does not give the states that it is asked for."""
        return "choose another model" if self.spec.final else "use layer: -1, or another model"

    @torch.inference_mode()
    def _try(self) -> None:
        """Run two captions of three tokens: whether the model runs at all, and what its first token
        attends to.

        A shared prefix and unmasked padding are right for causal models only, and a config may be
        wrong.
        """
        ids = torch.tensor([[5, 6, 5], [5, 7, 6]], device=self.device)
        inputs: dict[str, Any] = {"input_ids": ids}
        if self.spec.kind != "encoder":
            inputs["use_cache"] = False
        try:
            states = self._states(**inputs)
        except REFUSALS as error:
            reason = (
                f"it does not run with {self.spec.blocks} of {self.spec.total_blocks} "
                "blocks and text alone"
            )
            detail = f" ({type(error).__name__}: {one_line(error, 120)})"
            raise self._refusal(reason + detail, self._elsewhere) from None
        if states.shape != (2, 3, self.spec.width):
            raise self._refusal(
                f"a block of this model gives {list(states.shape)} for 2 captions of 3 tokens, "
                f"expected {[2, 3, self.spec.width]}",
                self._elsewhere,
            )
        if self.spec.kind == "encoder":
            return
        one, other = states[:, 0].float()
        sees = bool((one - other).norm() > 1e-3 * one.norm())
        if sees == (self.spec.kind == "unmasked"):
            return
        if sees:
            raise self._refusal(
                "this model attends in both directions",
                "use kind: unmasked, which keeps the instruction, or kind: encoder, which reads "
                "the bare caption",
            )
        raise self._refusal("this model keeps its causal mask", "use kind: causal")

    @torch.inference_mode()
    def read_context(self, ids: torch.Tensor) -> torch.Tensor:
        """Run the context [1, P] once, keep its keys and values for `after_context`; returns its
        states [1, P, W].

        InputError where a block keeps anything else of what it has read.
        """
        from transformers import DynamicCache

        self._context = DynamicCache(config=self.model.config)
        del self._context.layers[self.spec.blocks :]  # the config is still the whole model's
        for layer in self._context.layers:
            # what runs over it would change it for all other captions
            if type(layer).__name__ not in SHAREABLE:
                raise self._refusal(
                    "blocks of this model keep more of a prefix than keys and values "
                    f"({type(layer).__name__})",
                    "choose a model whose blocks are all attention",
                )
        try:
            states = self._states(input_ids=ids, past_key_values=self._context, use_cache=True)
        except REFUSALS as error:
            raise self._refusal(
                f"this model cannot read a prefix ahead ({type(error).__name__}: "
                f"{one_line(error, 120)})",
                "choose a model whose blocks are all attention",
            ) from None
        self._check_context(ids.shape[1])
        self._context_tokens = ids.shape[1]
        return states

    def _check_context(self, tokens: int) -> None:
        """Some models take a cache and leave it empty: their captions would be read as if nothing
        stood before them.
        """
        layers = [layer for layer in self._context.layers if type(layer).__name__ != "DummyLayer"]
        held = [layer.get_seq_length() if layer.keys is not None else 0 for layer in layers]
        if len(layers) > self.spec.blocks or any(count != tokens for count in held) or not held:
            raise self._refusal(
                f"this model keeps {min(held, default=0)} of the {tokens} tokens before a "
                "caption, so it would read "
                "captions without their instruction",
                "choose a model whose blocks are all attention",
            )

    def require_positions(self, context: int, longest: int) -> None:
        """InputError where a context and the longest caption take more positions than the model has
        learned.
        """
        for name, module in self.model.named_modules():
            if not isinstance(module, nn.Embedding) or not POSITION_TABLE.search(name):
                continue
            skipped = getattr(module, "offset", None)  # rows that no position uses
            if skipped is None:
                skipped = 0 if module.padding_idx is None else module.padding_idx + 1
            rows = module.num_embeddings - int(skipped)
            if context + longest > rows:
                taken = context + longest
                raise self._refusal(
                    f"this model has learned {rows} positions, instruction and longest caption "
                    f"take {taken}",
                    f"set max_tokens to {rows - context} or less"
                    if rows > context
                    else "shorten the instruction",
                )

    @torch.inference_mode()
    def after_context(
        self,
        ids: torch.Tensor,
        mask: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """States [B, T, W] of right-padded captions [B, T] behind the context, if there is one.

        Needs no padding mask: a causal model never looks at what stands to the right, and padding
        only stands there. mask [B, C + T] and positions [B, T] are for padding whose own states are
        wanted.
        """
        inputs: dict[str, Any] = {} if mask is None else {"attention_mask": mask.long()}
        if positions is not None:
            inputs["position_ids"] = positions
        if self._context is None:
            return self._states(input_ids=ids, use_cache=False, **inputs)
        cache = _shared_context(self._context, ids.shape[0], self._release_keys)
        return self._states(input_ids=ids, past_key_values=cache, use_cache=True, **inputs)

    @torch.inference_mode()
    def after_context_packed(self, rows: Sequence[Sequence[int]], longest: int = 0) -> torch.Tensor:
        """States [N, W] of captions behind the context, one after the other; N tokens in all, none
        of them padding.

        NotImplementedError where the model's attention is more than causal attention, for captions
        of up to `longest` tokens too.
        """
        lengths = [len(row) for row in rows]
        packing = Packing.of(lengths, longest, self._context, self._context_tokens, self.device)
        # [1, N]
        ids = torch.tensor([[token for row in rows for token in row]]).to(
            self.device, non_blocking=True
        )
        with packed(self.model, packing):
            return self._states(
                input_ids=ids, position_ids=packing.positions(lengths), use_cache=False
            )[0]

    def packing_agrees(self, longest: int) -> bool:
        """Whether captions of up to `longest` tokens can run packed, with the states that they have
        padded.

        A model may attend in a way of its own.
        """
        padded = torch.zeros(len(PACKING_TRIAL), max(map(len, PACKING_TRIAL)), dtype=torch.long)
        for row, ids in enumerate(PACKING_TRIAL):
            padded[row, : len(ids)] = torch.tensor(ids)
        expected = self.after_context(padded.to(self.device))
        try:
            found = self.after_context_packed(PACKING_TRIAL, longest).split(
                [len(ids) for ids in PACKING_TRIAL]
            )
        except REFUSALS as error:
            log.info("encoder %s: captions run padded (%s)", self.spec.name, one_line(error, 120))
            return False
        limit = PACKING_TOLERANCE.get(self.spec.dtype, PACKING_TOLERANCE["bfloat16"])
        for alone, states in zip(found, expected, strict=True):
            right = states[: len(alone)].float()  # [T, W]
            if not (alone.float() - right).norm() <= limit * right.norm():
                log.info(
                    "encoder %s: captions run padded: this model gives other states packed",
                    self.spec.name,
                )
                return False
        return True

    @torch.inference_mode()
    def whole(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """States [B, T, W] of right-padded sequences [B, T] with a boolean padding mask [B, T]."""
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask.long()}
        if self.spec.kind != "encoder":
            inputs["use_cache"] = False
        return self._states(**inputs)


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
        # A block's keys and values of the whole batch would otherwise live until the last block has
        # run.
        update = fresh.update

        def update_and_release(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
            keys, values = update(*args, **kwargs)
            # Fresh ones: an empty slice would keep the whole storage alive.
            fresh.keys = keys.new_empty((*keys.shape[:-2], 0, keys.shape[-1]))
            fresh.values = values.new_empty((*values.shape[:-2], 0, values.shape[-1]))
            return keys, values

        fresh.update = update_and_release
    return fresh
