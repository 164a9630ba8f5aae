"""Reading a complete family: torch tensors, row by row, without a copy where the storage dtype
allows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Any

import torch

from lidit.errors import InputError
from lidit.store.coding.transform import CodedStates, step_sizes, varying
from lidit.store.condition import arguments
from lidit.store.family import Family
from lidit.store.files.cache import cache_limit, cache_place
from lidit.store.files.ranges import RangedBytes
from lidit.store.latent_file import LatentFile
from lidit.store.manifest import read_named_table
from lidit.store.row_index import Layout, RowIndex, head, read_head
from lidit.store.shared import SharedStates, read_shared
from lidit.store.text_file import TextFile

FETCHERS = 16  # units whose rows are brought from a URL at once


class TextFamily(Family):
    """States of one encoder, row-aligned with `captions/`. Opened by `Corpus.text_family`."""

    def _load(self, record: dict[str, Any], where: str) -> TextFile:
        place = None if self.folder.local else cache_place(where)
        index = record.get("index")
        if index is None or "storage" not in self.spec or (place is not None and place.exists()):
            return TextFile.load(
                self.folder.map(record["file"], keep_local=True), where, self._remedy
            )
        # The row index first, against the record; behind a URL nothing else but the rows that are
        # asked for.
        layout = Layout(self.spec["storage"], self.width)
        contents = self.folder.read_ranges(
            record["file"], [head(position, layout.storage) for position in index]
        )
        parts = [read_head(*found, layout, where) for found in zip(index, contents, strict=True)]
        if self.folder.local:
            return TextFile.load(self.folder.map(record["file"]), where, self._remedy)
        return TextFile(
            layout,
            RowIndex.joined(parts),
            RangedBytes(self.folder, record["file"]),
            where,
            self._remedy,
        )

    def _whole(self, unit: int) -> TextFile:
        """The unit's file with everything in it."""
        file: TextFile = self._open(unit)
        if not file.whole:
            record = self.record(unit)
            where = self.folder.where(record["file"])
            file = TextFile.load(
                self.folder.map(record["file"], keep_local=True), where, self._remedy
            )
            with self._lock:
                self._files[unit] = file
        return file

    def fetch(self, wanted: Mapping[int, Sequence[int]]) -> None:
        """Bring rows behind a URL to this machine, many at once, for reads that follow; nothing
        where they are here.

        Args:
            wanted: Unit -> rows of its captions.

        Raises:
            InputError: A file is missing or damaged.
        """
        if self.folder.local or not cache_limit():
            return

        def one(unit: int) -> None:
            self._open(unit).check(wanted[unit])

        with ThreadPoolExecutor(FETCHERS, thread_name_prefix="fetch") as pool:
            for _ in pool.map(one, wanted):
                pass

    @property
    def width(self) -> int:
        """Width W of the states."""
        return self.shared().mean.shape[0]

    def shared(self) -> SharedStates:
        """Read what all captions have in common; checked against the manifest's sha256.

        Returns:
            The states of the instruction and of the empty caption, mean and deviation of each
            channel.

        Raises:
            InputError: The file is missing or damaged.
        """
        return self._shared

    @cached_property
    def _shared(self) -> SharedStates:
        reference = self.manifest["shared"]
        if reference is None:
            raise InputError(
                f"{self.folder.location}: no shared states; run lidit repair, then lidit embed"
            )
        table = read_named_table(self.folder, reference)
        return read_shared(table, reference["sha256"], self.folder.where(reference["file"]))

    def read(
        self, unit: int, rows: Sequence[int] | None = None, check: bool = False
    ) -> list[torch.Tensor]:
        """Read the states of captions of one unit.

        float32 and bfloat16 states are views of a private memory map: nothing is copied, and
        writing to them never reaches the file.

        Args:
            unit: Number of the unit, from 0.
            rows: Rows of the unit's captions; None reads all.
            check: Whether to refuse rows in which a bit has flipped, by the rows' own checksums; in
                files without
                them by the whole file's sha256, once.

        Returns:
            One [T, W] tensor per row, without the instruction's states: bfloat16 where they are
            stored as such, else float32.

        Raises:
            InputError: No such unit, or its file is missing or damaged.
        """
        file = self._whole(unit) if rows is None else self._open(unit)
        self._compare(unit, file, check)
        return file.states(rows, self.shared(), check)

    @cached_property
    def has_steps(self) -> bool:
        """Whether `read_coded` can give states as whole steps: of storage coded, and of int8 unless
        a channel is constant, which a model only centres.
        """
        shared = self.shared()
        if self.spec.get("storage") != "int8":
            return shared.code is not None
        return torch.equal(varying(shared.mean, shared.deviation), shared.deviation)

    def read_coded(self, unit: int, rows: Sequence[int], check: bool = False) -> list[CodedStates]:
        """Read the states of captions as they are coded, in a family that `has_steps`: smaller, and
        soon read.

        Args:
            unit: Number of the unit, from 0.
            rows: Rows of the unit's captions.
            check: As in `read`.

        Returns:
            Whole steps [T, W] and the size [T] of a step of each token, per row: steps times their
            size are standardised states, in a family of storage coded after `shared().code.back`.

        Raises:
            InputError: No such unit, or its file is missing or damaged.
        """
        shared = self.shared()
        file = self._open(unit)
        self._compare(unit, file, check)
        if shared.code is None:
            return file.int8(rows, check)
        values, scale = file.coded(rows, shared, check)
        lengths = file.lengths[list(rows)].tolist()
        sizes = step_sizes(scale, shared.code.step).split(lengths)
        return [CodedStates(*row) for row in zip(values.split(lengths), sizes, strict=True)]

    def _compare(self, unit: int, file: TextFile, check: bool) -> None:
        """Compare a file as a whole where its rows have no checksums of their own."""
        if check and not file.has_checksums:
            self.verify_unit(unit)

    def pooled(self, unit: int, rows: Sequence[int] | None = None) -> list[torch.Tensor] | None:
        """Read the pooled vectors of captions of one unit.

        Args:
            unit: Number of the unit, from 0.
            rows: Rows of the unit's captions; None reads all.

        Returns:
            One [X] float32 tensor per row; None where the family has no pooled vectors.
        """
        vectors = self._whole(unit).pooled(rows)
        if vectors is None and self.shared().empty_pooled is not None:
            return []  # a unit without a caption has no batch that says so
        return vectors

    def prompt_embeds(
        self, unit: int, rows: Sequence[int] | None = None, padded: int | None = None
    ) -> dict[str, Any]:
        """Read captions as a public pipeline's call takes them: `pipe(**family.prompt_embeds(0))`.

        Args:
            unit: Number of the unit, from 0.
            rows: Rows of the unit's captions; None reads all.
            padded: Tokens that states are filled up to with zeros; None: those of the longest row.

        Returns:
            The call's arguments by name, such as prompt_embeds and prompt_embeds_mask.

        Raises:
            InputError: The encoder names no pipeline, or a row is longer than `padded`.
        """
        return arguments(self, self.read(unit, rows), self.pooled(unit, rows), padded)

    def negative_prompt_embeds(self, count: int = 1, padded: int | None = None) -> dict[str, Any]:
        """The empty caption as `prompt_embeds` gives captions, `count` times.

        Args:
            count: Rows.
            padded: As in `prompt_embeds`.

        Returns:
            As `prompt_embeds`, each name with `negative_` before it.
        """
        shared = self.shared()
        pooled = None if shared.empty_pooled is None else [shared.empty_pooled] * count
        found = arguments(self, [shared.empty] * count, pooled, padded)
        return {f"negative_{name}": value for name, value in found.items()}

    def token_ids(self, unit: int, rows: Sequence[int] | None = None) -> list[list[int]]:
        """Read the token ids behind `read`, without the instruction's.

        Args:
            unit: Number of the unit, from 0.
            rows: Rows of the unit's captions; None reads all.

        Returns:
            One list of T ids per row.
        """
        return self._whole(unit).token_ids(rows)

    def lengths(self, unit: int) -> list[int]:
        """Count the tokens of each caption of one unit.

        Args:
            unit: Number of the unit, from 0.

        Returns:
            T of each row.
        """
        lengths: list[int] = self._open(unit).lengths.tolist()
        return lengths


class LatentFamily(Family):
    """Latents of one codec, row-aligned with `samples/`. Opened by `Corpus.latent_family`."""

    def _load(self, record: dict[str, Any], where: str) -> LatentFile:
        return LatentFile.load(self.folder.map(record["file"], keep_local=True), where)

    def read(
        self, unit: int, rows: Sequence[int] | None = None, seeds: Sequence[int] | None = None
    ) -> list[torch.Tensor]:
        """Read the latents of samples of one unit, scaled as the diffusion model sees them.

        Args:
            unit: Number of the unit, from 0.
            rows: Rows of the unit's samples; None reads all.
            seeds: For codecs with a posterior, one seed per row: mean + deviation x noise of that
                seed. None gives the
                mean.

        Returns:
            One [C, H, W] float32 tensor per row.

        Raises:
            InputError: No such unit, or its file is missing or damaged.
        """
        latents: list[torch.Tensor] = self._open(unit).latents(rows, seeds)
        return latents

    def shapes(self, unit: int) -> list[tuple[int, int, int]]:
        """Read the shapes of one unit's latents.

        Args:
            unit: Number of the unit, from 0.

        Returns:
            (C, H, W) of each row.
        """
        shapes: list[tuple[int, int, int]] = self._open(unit).shapes
        return shapes
