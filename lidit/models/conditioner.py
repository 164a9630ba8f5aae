"""LLM states -> the transformer's text condition (paper 3.1).

projection -> linguistic refiner, per LLM; collaborative refiner over all; cut the instruction;
concatenate; pool.

Shapes: B batch, P prefix tokens, T caption tokens, W width of an LLM, S condition tokens, D width;
of LLMs whose layers are kept apart L layers, R averages of a token (mixture.py), K transformer
blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Self

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from lidit.errors import InputError
from lidit.models.fusion import CollaborativeRefiner
from lidit.models.layers import TimestepEmbedder, compute_dtype, normalise
from lidit.models.mixture import LayerMixture, Layers, check_layers
from lidit.models.refiner import LinguisticRefiner
from lidit.models.states import PromptCondition, TextStates, attendable, masked_mean

STANDARDISED_LIMIT = 10.0
CONSTANT = 1e-6


class StateProjection(nn.Module):
    """Raw states of one LLM, standardised per channel and clamped, then projected to the
    transformer's width.

    An LLM's residual stream has channels hundreds of deviations wide; the statistics are the
    family's own. With a `mixture` a state holds L layers one behind the other, each normalised over
    its width before they are averaged. Of a coded family come whole steps, which
    `steps_to_standard` [W, W] turns into standardised states here, where a product is cheap; of an
    int8 family too, where it is None. It belongs to the family, not to the weights, and is in no
    checkpoint.
    """

    mean: torch.Tensor
    deviation: torch.Tensor
    steps_to_standard: torch.Tensor | None

    def __init__(
        self, encoder_width: int, width: int, layers: int = 1, mixture: LayerMixture | None = None
    ) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(encoder_width))
        self.register_buffer("deviation", torch.ones(encoder_width))
        self.register_buffer("steps_to_standard", None, persistent=False)
        self.takes_steps = False
        self.layers = layers
        self.mixture = mixture
        self.linear = nn.Linear(encoder_width // layers, width)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        """Casts the weights but never the statistics below float32: a mean of 500 is off by 2 in
        bfloat16.
        """
        names = ("mean", "deviation", "steps_to_standard")
        exact = {name: held for name in names if (held := getattr(self, name)) is not None}
        super()._apply(fn, recurse)
        for name, before in exact.items():
            after = getattr(self, name)
            dtype = torch.promote_types(torch.float32, after.dtype)
            movable = not before.is_meta and not after.is_meta
            setattr(self, name, before.to(after.device, dtype) if movable else after.to(dtype))
        return self

    def forward(self, states: torch.Tensor, size: torch.Tensor | None = None) -> torch.Tensor:
        """[..., W] of any floating dtype, or whole steps and their size [...] -> [..., R, D] in the
        weights' dtype; R is 1 without a mixture.
        """
        if size is None:
            standardised = (states - self.mean) / self.deviation
        else:
            standardised = self._of_steps(states).float() * size[..., None]
        standardised = standardised.clamp(-STANDARDISED_LIMIT, STANDARDISED_LIMIT)
        layers = standardised.unflatten(-1, (self.layers, -1))  # [..., L, W]
        if self.mixture is None:
            return self.linear(layers.to(compute_dtype(self.linear)))
        layers = normalise(layers)
        # The projection is linear and weights sum to 1: it comes before or behind the average,
        # where it costs less.
        if self.mixture.averages == 1:
            return self.linear(self.mixture(layers).to(compute_dtype(self.linear)))
        return self.mixture(self.linear(layers.to(compute_dtype(self.linear))))

    def _of_steps(self, steps: torch.Tensor) -> torch.Tensor:
        """Whole steps [..., W] -> standardised states in steps."""
        if not self.takes_steps:
            raise InputError(
                "coded states need their family's code: call conditioner.set_code before training"
            )
        if self.steps_to_standard is None:
            return steps
        # Steps are below 256 but for few, so exact in bfloat16; the size comes after the sum.
        dtype = compute_dtype(self.linear)
        return steps.to(dtype) @ self.steps_to_standard.to(dtype)


class AdaptiveCondition(nn.Module):
    """Mean of the caption's valid tokens + timestep embedding: what drives gates and modulation
    (paper 3.1).
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.timestep_embedder = TimestepEmbedder(width)
        self.text = nn.Linear(width, width)

    def forward(
        self, caption: torch.Tensor, mask: torch.Tensor, timestep: torch.Tensor
    ) -> torch.Tensor:
        """Projected caption tokens [B, T, D], bool [B, T], float [B] -> [B, D]."""
        pooled = masked_mean(caption, mask).to(caption.dtype)
        return self.timestep_embedder(timestep) + self.text(pooled)


class EncoderBranch(nn.Module):
    """Everything that belongs to one LLM alone: projection, adaptive condition,
    linguistic refiner.
    """

    def __init__(
        self,
        projection: StateProjection,
        width: int,
        refiner: LinguisticRefiner | None,
        adaptive: bool,
    ) -> None:
        super().__init__()
        self.projection = projection
        self.condition = AdaptiveCondition(width) if adaptive else None
        self.refiner = refiner

    def forward(
        self, text: TextStates, timestep: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """-> refined tokens [B, P + T, D], their mask, the adaptive condition [B, D] (None where
        nothing needs it), and how far each block's own average of a caption token is from the
        refiners' [B, K or 0, T, D].
        """
        batch, prefix_length = len(text.states), len(text.prefix)
        hidden = ~text.mask[..., None]
        # Zeros before the arithmetic, so that even a NaN behind the mask stays there; and after it,
        # for the bias.
        size = None if text.size is None else text.size.masked_fill(~text.mask, 0)
        averages = self.projection(text.states.masked_fill(hidden, 0), size)
        averages = averages.masked_fill(hidden[..., None], 0)  # [B, T, R, D]
        caption = averages[..., 0, :]  # [B, T, D]
        apart = (averages[..., 1:, :] - caption[..., None, :]).transpose(1, 2)  # [B, R - 1, T, D]
        condition = None if self.condition is None else self.condition(caption, text.mask, timestep)
        prefix = self.projection(text.prefix)[..., 0, :].expand(batch, -1, -1)  # [B, P, D]
        tokens = torch.cat([prefix, caption], dim=1)
        mask = torch.cat([text.mask.new_ones(batch, prefix_length), text.mask], dim=1)
        if self.refiner is not None:
            tokens = self.refiner(tokens, mask, condition)
        return tokens, mask, condition, apart


class PromptConditioner(ModelMixin, ConfigMixin):
    """States of one or several LLMs -> one text condition.

    Args:
        encoders: name -> width of its states. Branches are kept in the order of the names.
        width, heads: the transformer's.
        refiner_depth, refiner_causal, refiner_gated, refiner_mixing: see `LinguisticRefiner`; depth
            0 leaves it out.
        fusion_mode: "refiner" (collaborative), "concatenation", or "none" for exactly one encoder
            (table 6). With one
            encoder there is nothing to fuse and all three are the same.
        fusion_depth: blocks of the collaborative refiner.
        visible_tokens: caption tokens per encoder that leave the conditioner, from the first; None
            leaves all. The
            refiners see every token whatever it is: what reaches the transformer from behind was
            carried by them.
        layers, stored_layers: how the layers that an encoder keeps apart become one (mixture.py),
            and how many they are
            by the encoder's name; one where it is not named.
        blocks: of the transformer, for layers "per_block": the refiners read an average of their
            own, and what they
            change in it is added to each block's.
    Raises:
        InputError: no encoder, several with fusion mode "none", or layers that no encoder has.
    """

    _keep_in_fp32_modules = ["mean", "deviation"]
    _no_split_modules = ["EncoderBranch"]

    @register_to_config
    def __init__(
        self,
        encoders: dict[str, int],
        width: int,
        heads: int,
        refiner_depth: int = 2,
        refiner_causal: bool = False,
        refiner_gated: bool = True,
        refiner_mixing: bool = True,
        fusion_mode: Literal["none", "concatenation", "refiner"] = "refiner",
        fusion_depth: int = 1,
        visible_tokens: int | None = None,
        layers: Layers = "one",
        stored_layers: dict[str, int] | None = None,
        blocks: int = 0,
    ) -> None:
        super().__init__()
        if not encoders:
            raise InputError("the model needs at least one encoder")
        if fusion_mode == "none" and len(encoders) > 1:
            raise InputError(
                f"fusion mode 'none' takes exactly one encoder, found {sorted(encoders)}"
            )
        stored = {name: (stored_layers or {}).get(name, 1) for name in encoders}
        check_layers(layers, stored)
        self.visible_tokens = visible_tokens
        self.blocks = blocks if layers == "per_block" else 0
        # a saved configuration sorts its keys, so no other order would survive
        self.names = sorted(encoders)
        fuse = fusion_mode == "refiner" and len(encoders) > 1
        adaptive = fuse or (refiner_depth > 0 and refiner_gated)
        self.branches = nn.ModuleList(
            EncoderBranch(
                StateProjection(
                    encoders[name],
                    width,
                    stored[name],
                    LayerMixture(stored[name], layers, blocks) if stored[name] > 1 else None,
                ),
                width,
                LinguisticRefiner(
                    width, heads, refiner_depth, refiner_causal, refiner_gated, refiner_mixing
                )
                if refiner_depth > 0
                else None,
                adaptive,
            )
            for name in self.names
        )
        self.fusion = (
            CollaborativeRefiner(len(encoders), width, heads, fusion_depth) if fuse else None
        )

    def set_statistics(self, name: str, mean: torch.Tensor, deviation: torch.Tensor) -> None:
        """Each channel's mean and deviation [W] of encoder `name`, kept with the weights.

        A channel whose deviation is within float32 rounding of its mean is constant; it is only
        centred. Raises InputError for an unknown encoder, a wrong width, or values that are
        negative or not finite.
        """
        projection = self.branch(name).projection
        for label, values in (("mean", mean), ("deviation", deviation)):
            if values.shape != projection.mean.shape:
                raise InputError(
                    f"encoder {name!r}: {label} has shape {list(values.shape)}, "
                    f"the model expects {list(projection.mean.shape)}"
                )
            if not torch.isfinite(values).all() or (label == "deviation" and (values < 0).any()):
                raise InputError(
                    f"encoder {name!r}: {label} holds values that are negative or not finite"
                )
        projection.mean.copy_(mean)
        varies = deviation > CONSTANT * mean.abs()
        projection.deviation.copy_(torch.where(varies, deviation, torch.ones_like(deviation)))

    def set_code(self, name: str, steps_to_standard: torch.Tensor | None) -> None:
        """What turns the whole steps of encoder `name`'s coded family into standardised states:
        [W, W] float32; None: they are standardised, as an int8 family's.

        Raises InputError for an unknown encoder or a wrong width.
        """
        projection = self.branch(name).projection
        width = len(projection.mean)
        if steps_to_standard is not None and steps_to_standard.shape != (width, width):
            raise InputError(
                f"encoder {name!r}: the code has shape {list(steps_to_standard.shape)}, the "
                "model expects "
                f"{[width, width]}"
            )
        if steps_to_standard is not None:
            steps_to_standard = steps_to_standard.to(projection.mean.device, copy=True)
        projection.takes_steps, projection.steps_to_standard = True, steps_to_standard

    def knows_code(self, name: str) -> bool:
        """Whether encoder `name`'s states may come as whole steps."""
        found: bool = self.branch(name).projection.takes_steps
        return found

    def branch(self, name: str) -> Any:
        """The branch of encoder `name`. Raises InputError naming what exists."""
        if name not in self.names:
            raise InputError(
                f"the model has no encoder {name!r}; it was built for {', '.join(self.names)}"
            )
        return self.branches[self.names.index(name)]

    def forward(self, text: Mapping[str, TextStates], timestep: torch.Tensor) -> PromptCondition:
        """`text` one entry per encoder, `timestep` float [B] in [0, 1] (0 data, 1 noise).

        Raises InputError naming the encoder whose states are missing, unknown or of a wrong shape.
        """
        self.check(text)
        states, masks, conditions, apart = [], [], [], []
        for name, branch in zip(self.names, self.branches, strict=True):
            tokens, mask, condition, differences = branch(text[name], timestep)
            states.append(tokens)
            masks.append(mask)
            conditions.append(condition)
            apart.append(differences)
        if self.fusion is not None:
            states = self.fusion(states, masks, conditions)
        # Only now the instruction is cut off: both refiners have seen it.
        # each [B, T, D]
        captions = [states[i][:, len(text[name].prefix) :] for i, name in enumerate(self.names)]
        # [B, S, D]
        tokens = torch.cat([caption[:, : self.visible_tokens] for caption in captions], dim=1)
        # [B, S]
        mask = torch.cat([text[name].mask[:, : self.visible_tokens] for name in self.names], dim=1)
        of_blocks = self._of_blocks(captions, apart) if self.blocks else None
        return PromptCondition(
            tokens, attendable(mask), masked_mean(tokens, mask).to(tokens.dtype), of_blocks
        )

    def _of_blocks(
        self, captions: Sequence[torch.Tensor], apart: Sequence[torch.Tensor]
    ) -> torch.Tensor:
        """Each block's tokens [B, K, S, D]: its own average in the place of the refiners'; an
        encoder of one layer has none.
        """
        own = [
            refined[:, None]
            + (differences if differences.shape[1] else differences.new_zeros(self.blocks, 1, 1))
            for refined, differences in zip(captions, apart, strict=True)
        ]  # each [B, K, T, D]
        return torch.cat([tokens[:, :, : self.visible_tokens] for tokens in own], dim=2)

    def check(self, text: Mapping[str, TextStates]) -> None:
        """Raises InputError unless `text` fits this model."""
        missing = [name for name in self.names if name not in text]
        unknown = [name for name in text if name not in self.names]
        if missing or unknown:
            found = (
                f"states of {missing} are missing"
                if missing
                else f"states of {unknown} are not used by this model"
            )
            raise InputError(f"{found}; it was built for the encoders {', '.join(self.names)}")
        for name in self.names:
            entry, width = text[name], len(self.branch(name).projection.mean)
            for label, tensor in (("states", entry.states), ("prefix", entry.prefix)):
                if tensor.shape[-1] != width:
                    raise InputError(
                        f"encoder {name!r}: {label} are {tensor.shape[-1]} wide, the model "
                        f"expects {width}"
                    )
            if entry.mask.shape != entry.states.shape[:2] or entry.mask.dtype != torch.bool:
                raise InputError(
                    f"encoder {name!r}: mask must be bool {list(entry.states.shape[:2])}, "
                    f"found {entry.mask.dtype} {list(entry.mask.shape)}"
                )
            if entry.size is not None and entry.size.shape != entry.mask.shape:
                raise InputError(
                    f"encoder {name!r}: sizes of steps must be {list(entry.mask.shape)}, found "
                    f"{list(entry.size.shape)}"
                )
        rows = {name: len(text[name].states) for name in self.names}
        if len(set(rows.values())) > 1:
            raise InputError(
                f"the encoders must have states of the same captions, got different numbers: {rows}"
            )
