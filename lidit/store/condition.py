"""A family's states as the call of a public pipeline takes them: names, layout, mask, dtype.

Which pipeline, and what it calls them, stands in the encoder's settings, which a family's manifest
repeats.

Legend: B rows, P prefix tokens, T tokens of a row, N tokens of the longest, L layers, W width of
one, X of pooled.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch.nn.functional import pad

from lidit.errors import InputError
from lidit.store.files.folder import Folder
from lidit.store.shared import SharedStates


class Conditioned(Protocol):
    """What is asked of a text family."""

    folder: Folder
    manifest: dict[str, Any]
    spec: dict[str, Any]

    def shared(self) -> SharedStates: ...


def arguments(
    family: Conditioned,
    states: Sequence[torch.Tensor],
    pooled: Sequence[torch.Tensor] | None,
    padded: int | None,
) -> dict[str, Any]:
    """The call's arguments for rows of states [T, ...] and pooled vectors [X]."""
    layout = _layout(family)
    found: dict[str, Any] = {}
    if layout["states"] is not None:
        prefix = _instruction(family.shared().prefix, layout["instruction"])  # [P, L * W]
        dtype = states[0].dtype if len(states) else prefix.dtype
        rows = [torch.cat([prefix.to(dtype), row]) for row in states]
        found[layout["states"]] = _placed(family, rows, layout, padded)
        if layout["mask"] is not None:
            mask = _mask([len(row) for row in rows], layout, padded, dtype)
            found[layout["mask"]] = (
                mask if layout["mask_if_full"] or not mask.bool().all() else None
            )
    if layout["pooled"] is not None:
        if pooled is None:
            raise InputError(
                f"{family.folder.location}: the family has no pooled vectors; set pooled "
                "and embed anew"
            )
        vectors = torch.stack(list(pooled))  # [B, X]
        # families of earlier releases have no such entry
        as_token = layout.get("pooled_as_token", False)
        found[layout["pooled"]] = vectors[:, None] if as_token else vectors
    return found


def _layout(family: Conditioned) -> dict[str, Any]:
    layout = family.manifest["extra"].get("encoder", {}).get("condition")
    if not layout:
        raise InputError(
            f"{family.folder.location}: the encoder names no pipeline whose call would take "
            "these states; read them "
            "with read(), or give the encoder a condition"
        )
    return dict(layout)


def _instruction(prefix: torch.Tensor, count: int | str) -> torch.Tensor:
    """The states of the instruction that are part of a condition; negative counts from its end."""
    if isinstance(count, str):
        return prefix
    return prefix[:count] if count >= 0 else prefix[count:]


def _placed(
    family: Conditioned, rows: Sequence[torch.Tensor], layout: dict[str, Any], padded: int | None
) -> Any:
    """Rows [T, L * W] in the layout that the pipeline wants."""
    if layout["layout"] == "list":
        return [row.clone() for row in rows]
    longest = _longest([len(row) for row in rows], padded, family.folder.location)
    full = torch.stack([_filled(row, longest, layout["side"]) for row in rows])  # [B, N, L * W]
    layers = len(family.spec.get("layers", (0,)))
    if layout["layout"] == "layers_first":
        return full.unflatten(-1, (layers, -1)).movedim(2, 0).contiguous()  # [L, B, N, W]
    if layout["bundles"] > 1:
        # [B, bundles, N, W]
        return full.unflatten(-1, (layout["bundles"], -1)).movedim(2, 1).contiguous()
    if family.spec.get("join") == "separate":
        return full.unflatten(-1, (layers, -1))  # [B, N, L, W]
    return full


def _longest(lengths: Sequence[int], padded: int | None, where: str) -> int:
    longest = max(lengths, default=0)
    if padded is not None and longest > padded:
        raise InputError(
            f"{where}: a caption of {longest} tokens does not fit into {padded}; set padded "
            f"to {longest}"
        )
    return longest if padded is None else padded


def _filled(row: torch.Tensor, longest: int, side: str) -> torch.Tensor:
    missing = longest - len(row)
    return pad(row, (0, 0, missing, 0) if side == "left" else (0, 0, 0, missing))


def _mask(
    lengths: Sequence[int], layout: dict[str, Any], padded: int | None, dtype: torch.dtype
) -> torch.Tensor:
    """[B, N]: which tokens are a caption's."""
    longest = max(lengths, default=0) if padded is None else padded
    place = torch.arange(longest)
    if layout["side"] == "left":
        place = place.flip(0)
    mask = place < torch.tensor(list(lengths))[:, None]  # [B, N]
    return mask.to(
        {"int64": torch.int64, "bool": torch.bool, "states": dtype}[layout["mask_dtype"]]
    )
