"""What an encoder spec says beyond model and instruction: which blocks' outputs are joined how, and
how text is read.

Only what differs from the default is part of a spec's identity, so specs that use none of it keep
their fingerprints.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from lidit.config import EncoderSettings
from lidit.errors import InputError


@dataclass(frozen=True)
class Reading:
    """What is taken of a forward pass. `layers` counts blocks from 1, 0 is the embeddings; None:
    the spec's block.
    """

    layers: tuple[int, ...] | None = None
    join: Literal["concatenate", "interleave", "separate", "mean"] = "concatenate"
    normalise: Literal["standard", "rms"] | None = None
    final_norm: bool = True
    pooled: Literal["pooler_output", "text_embeds"] | None = None


@dataclass(frozen=True)
class PaddingRule:
    """Padding that is computed and stored like text; see `PaddingSettings`."""

    multiple_of: int | None
    side: Literal["right", "left"]
    masked: bool
    token: Literal["pad", "eos"] | int
    position: int | None = None


@dataclass(frozen=True)
class TextRules:
    """From a caption to the token ids behind the instruction; see `EncoderSettings`."""

    template: str | None = None
    suffix: Literal["kept", "dropped"] | None = None
    generation_prompt: bool = False
    thinking: bool | None = None
    clean: tuple[str, ...] = ()
    spell_quoted: bool = False
    empty: int | str | None = None
    counted: Literal["caption", "with_suffix", "whole"] = "caption"
    padding: PaddingRule | None = None


ONE_BLOCK = Reading()
PLAIN_TEXT = TextRules()


def resolve_reading(settings: EncoderSettings, total: int) -> tuple[int, Reading]:
    """Blocks that run, and what is taken of them. InputError for a layer that a model of `total`
    blocks lacks.
    """
    layers = settings.layers
    if layers == "all" or layers == "all with embeddings":
        layers = tuple(range(1 if layers == "all" else 0, total + 1))
    several = layers is not None
    found = tuple(_block(settings, layer, total, several) for layer in layers or (settings.layer,))
    blocks = total if settings.pooled else max(found)
    # A single block as it is has one name, however it was asked for; beside a pooled vector it is
    # not the last to run.
    alone = (
        len(found) == 1
        and settings.normalise is None
        and settings.join != "separate"
        and found[0] == blocks
    )
    if total not in found and not settings.final_norm:
        raise InputError(
            f"encoder {settings.name}: final_norm: false is about the last block's output, "
            "which is not among the "
            "layers; leave it out, or take layer -1"
        )
    if max(found) == 0:
        raise InputError(
            f"encoder {settings.name}: layers: embeddings alone know nothing of a text; add a block"
        )
    return blocks, Reading(
        layers=None if alone else found,
        join=settings.join,
        normalise=settings.normalise,
        final_norm=settings.final_norm,
        pooled=settings.pooled,
    )


def joined_width(reading: Reading, width: int) -> int:
    """Width of a stored state, from that of the model."""
    several = reading.layers is not None and reading.join != "mean"
    return width * len(reading.layers or ()) if several else width


def _block(settings: EncoderSettings, layer: int, total: int, several: bool) -> int:
    block = layer if layer >= 0 else total + 1 + layer
    if not (0 if several else 1) <= block <= total:
        raise InputError(
            f"encoder {settings.name}: layer {layer}: {settings.model} has {total} blocks; "
            "choose 1 to "
            f"{total}, or -1 (the last, with the final norm) to {-total}"
        )
    return block


def text_rules(settings: EncoderSettings) -> TextRules:
    padding = settings.padding
    return TextRules(
        template=settings.template,
        suffix=settings.suffix,
        generation_prompt=settings.generation_prompt,
        thinking=settings.thinking,
        clean=settings.clean,
        spell_quoted=settings.spell_quoted,
        empty=settings.empty,
        counted=settings.counted,
        padding=None if padding is None else PaddingRule(**padding.model_dump()),
    )


def set_fields(rules: Reading | TextRules) -> dict[str, Any]:
    """The fields that are not at their default, as JSON holds them."""
    values = {field.name: getattr(rules, field.name) for field in fields(rules)}
    plain = {name: value for name, value in values.items() if value != getattr(type(rules)(), name)}
    return {
        name: list(value)
        if isinstance(value, tuple)
        else _padding_fields(value)
        if isinstance(value, PaddingRule)
        else value
        for name, value in plain.items()
    }


def _padding_fields(rule: PaddingRule) -> dict[str, Any]:
    found = asdict(rule)
    if rule.position is None:  # families of earlier releases have no such field
        del found["position"]
    return found
