"""Latents of one codec: columns, writing and reading.

Legend: C channels, H and W latent height and width.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch

from lidit.errors import InputError, JobError
from lidit.pixels import from_bytes, to_bytes
from lidit.store.schema import read_metadata, with_metadata
from lidit.store.text_file import list_values, record_batches

# uint8 is for codecs whose latents are the 8-bit pixels themselves, on [-1, 1].
ARROW_TYPES = {"float32": pa.float32(), "bfloat16": pa.uint16(), "uint8": pa.uint8()}
_TORCH_TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "uint8": torch.uint8}
CROP = pa.struct([(name, pa.int32()) for name in ("left", "top", "width", "height")])


@dataclass(frozen=True)
class Crop:
    """The part of the original image, in its own pixels after EXIF rotation, that
    the latents show.
    """

    left: int
    top: int
    width: int
    height: int


def latents_schema(storage: str, posterior: bool) -> pa.Schema:
    """tokens are spatial positions H x W; shape is [C, H, W]; deviation is the posterior's, where
    it is stored.
    """
    if storage not in ARROW_TYPES:
        raise InputError(f"latent storage {storage!r}: choose one of {', '.join(ARROW_TYPES)}")
    fields = [
        ("tokens", pa.int32()),
        ("shape", pa.list_(pa.int32())),
        ("crop", CROP),
        ("latents", pa.large_list(ARROW_TYPES[storage])),
    ]
    if posterior:
        fields.append(("deviation", pa.large_list(ARROW_TYPES[storage])))
    return with_metadata(
        pa.schema(fields), kind="latents", storage=storage, logical="float32", posterior=posterior
    )


def latents_table(
    latents: Sequence[torch.Tensor],
    crops: Sequence[Crop],
    storage: str,
    deviations: Sequence[torch.Tensor] | None = None,
) -> pa.Table:
    """Rows of a latents family. latents, deviations: one scaled [C, H, W] tensor per sample.

    uint8 expects values on [-1, 1]. Raises JobError for values that are not finite.
    """
    for row, latent in enumerate([*latents, *(deviations or [])]):
        if not torch.isfinite(latent).all():
            raise JobError(f"row {row % len(latents)}: the codec produced NaN or infinite latents")
    columns = [
        pa.array([latent.shape[1] * latent.shape[2] for latent in latents], pa.int32()),
        pa.array([list(latent.shape) for latent in latents], pa.list_(pa.int32())),
        pa.array([vars(crop) for crop in crops], CROP),
        _values(latents, storage),
    ]
    if deviations is not None:
        columns.append(_values(deviations, storage))
    return pa.Table.from_arrays(columns, schema=latents_schema(storage, deviations is not None))


def _values(tensors: Sequence[torch.Tensor], storage: str) -> pa.LargeListArray:
    flat = torch.cat([t.detach().cpu().reshape(-1) for t in tensors]) if tensors else torch.zeros(0)
    offsets = np.cumsum([0, *(t.numel() for t in tensors)], dtype=np.int64)
    if storage == "uint8":
        stored = to_bytes(flat)
    elif storage == "bfloat16":
        stored = flat.to(torch.bfloat16).view(torch.uint16)
    else:
        stored = flat.float()
    return pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(stored.numpy()))


class LatentFile:
    """One unit of a latents family."""

    def __init__(
        self,
        storage: str,
        columns: dict[str, list[torch.Tensor]],
        shapes: list[tuple[int, int, int]],
    ) -> None:
        self.storage, self.columns, self.shapes, self.rows = storage, columns, shapes, len(shapes)

    @classmethod
    def load(cls, content: mmap.mmap | bytearray, where: str) -> LatentFile:
        """Raises pa.ArrowInvalid or InputError for anything but a whole file of a
        latents family.
        """
        base, batches, schema = record_batches(content)
        facts = read_metadata(schema, where)
        names = ["latents", *(["deviation"] if facts["posterior"] else [])]
        columns: dict[str, list[torch.Tensor]] = {name: [] for name in names}
        shapes: list[tuple[int, int, int]] = []
        for batch in batches:
            sizes = [tuple(shape) for shape in batch.column("shape").to_pylist()]
            for name in names:
                dtype = _TORCH_TYPES[facts["storage"]]
                offsets, flat = list_values(content, base, batch.column(name), dtype, where)
                if [int(np.prod(size)) for size in sizes] != np.diff(offsets).tolist():
                    raise InputError(f"{where}: {name} do not fit their shapes; run lidit verify")
                columns[name] += flat[: int(offsets[-1])].split(np.diff(offsets).tolist())
            shapes += sizes
        return cls(facts["storage"], columns, shapes)

    def latents(
        self, rows: Sequence[int] | None, seeds: Sequence[int] | None
    ) -> list[torch.Tensor]:
        wanted = list(range(self.rows)) if rows is None else list(rows)
        if any(not 0 <= row < self.rows for row in wanted):
            raise IndexError(f"rows {wanted} of a unit with {self.rows} rows")
        means = [
            self._decode(self.columns["latents"][row]).view(self.shapes[row]) for row in wanted
        ]
        if seeds is None or "deviation" not in self.columns:
            return means
        sampled = []
        for row, seed, mean in zip(wanted, seeds, means, strict=True):
            noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(seed))
            sampled.append(
                mean + self._decode(self.columns["deviation"][row]).view(mean.shape) * noise
            )
        return sampled

    def _decode(self, stored: torch.Tensor) -> torch.Tensor:
        if self.storage == "uint8":
            return from_bytes(stored)
        return stored.float()
