"""Part 4: prompt states of a random LLaMA-3-8B shape: how near to its own dense rate, and what
stands between.

Legend: T caption tokens, W width.
"""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from benchmarks.embed import (
    dense_rate,
    ours,
    public_prompts,
    random_encoder,
    random_trunk,
    worst_error,
)
from benchmarks.gpu import timing
from benchmarks.gpu.run import Run
from lidit.store import SharedStates, UnitStatistics, channel_statistics
from lidit.text import PromptEncoder
from lidit.text.embedding import encoded_tables
from lidit.text.tokenizer import CaptionTokens

CAPTIONS, TOY_CAPTIONS = 1000, 24
BUDGETS = (8192, 16_384, 32_768)
CALLS = 2  # units that an actor has in work at once
MEMORY = Path("/dev/shm")  # a file system that is no disk


@contextlib.contextmanager
def padded(encoder: PromptEncoder) -> Iterator[None]:
    """Batches are padded meanwhile, as on a CPU."""
    before, encoder.trunk.packs = encoder.trunk.packs, False
    try:
        yield
    finally:
        encoder.trunk.packs = before


class Captions:
    """The encoder, the captions it reads, and the rates so far."""

    def __init__(self, run: Run) -> None:
        self.run = run
        texts, self.origin = public_prompts(TOY_CAPTIONS if run.toy else CAPTIONS)
        name = "tiny" if run.toy else "8b"
        began = time.monotonic()
        trunk = random_trunk(name, run.device.type)
        with tempfile.TemporaryDirectory() as folder:
            encoder = random_encoder(name, trunk, texts, Path(folder))
        if run.toy:  # on a CPU only a rehearsal packs
            encoder.trunk.packs = encoder.trunk.packing_agrees(encoder.tokenizer.longest)
        self.encoder = encoder
        self.loaded = time.monotonic() - began
        self.tokens = self.encoder.tokenizer.tokenize(texts)
        self.ids = [list(row.token_ids) for row in self.tokens]
        self.useful = sum(map(len, self.ids))
        self.dense = 0.0

    def facts(self) -> dict[str, Any]:
        return {
            "captions": len(self.ids),
            "tokens_per_caption": round(self.useful / len(self.ids), 1),
            "captions_from": self.origin,
            "load_seconds": round(self.loaded, 1),
            "parameters": self.encoder.trunk.parameters,
        }

    def find_dense(self) -> dict[str, Any]:
        """Tokens/s of full rectangles: the rate that all others are shares of."""
        self.dense = dense_rate(self.encoder, 0.1 if self.run.toy else 9)
        self.run.headline(f"dense {self.dense:.0f} tokens/s")
        return {"tokens_per_second": round(self.dense, 1)}

    def rate(self, budget: int) -> dict[str, Any]:
        """Useful tokens/s of two passes over the captions: one that meets every batch's shape
        first, one after it.
        """
        work = partial(ours, self.encoder, self.ids, budget)
        first = timing.wall(self.run, work)
        second = timing.wall(self.run, work)
        lengths = [len(ids) for ids in self.ids]
        return {
            "batches": len(self.encoder.plan(lengths, budget)),
            "first_seconds": round(first, 2),
            "tokens_per_second": round(self.useful / second, 1),
            "share_of_dense": round(self.useful / second / self.dense, 3) if self.dense else None,
            "padding_waste": round(self.encoder.padding(self.ids, budget).waste, 3),
        }

    def agreement(self, budget: int) -> dict[str, Any]:
        """Largest relative difference of a caption's states between packed and padded batches."""
        with padded(self.encoder):
            expected = ours(self.encoder, self.ids[:64], budget)
        found = ours(self.encoder, self.ids[:64], budget)
        return {
            "packs": self.encoder.trunk.packs,
            "relative_difference": round(worst_error(found, expected), 5),
        }

    def kernels(self, budget: int) -> dict[str, Any]:
        """What the GPU runs in one warm pass, and how busy it is."""
        found = timing.kernels(self.run, partial(ours, self.encoder, self.ids, budget), top=8)
        self.run.headline(f"busy {found['busy']:.0%}")
        return found

    def into_files(self, storage: str, threads: int, budget: int) -> dict[str, Any]:
        """Two units at once through packing into files in memory, as an actor does it: rate end to
        end.
        """
        torch.set_num_threads(threads)
        encoder = self.encoder
        encoder.spec = dataclasses.replace(encoder.spec, storage=storage)
        _, prefix = encoder.prefix_states()
        empty_ids, empty = encoder.empty_states()
        sample = ours(encoder, self.ids[:64], budget)
        mean, deviation = channel_statistics(sample)
        shared = SharedStates(prefix, empty, mean, deviation, (), tuple(empty_ids), "")
        lock = threading.Lock()
        units = 1 if self.run.toy else CALLS
        with tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as folder:

            def write(number: int) -> int:
                return _write(
                    encoder, shared, self.tokens, Path(folder) / f"{number}.arrow", budget, lock
                )

            def work() -> None:
                with ThreadPoolExecutor(CALLS) as pool:
                    written.append(sum(pool.map(write, range(units))))

            written: list[int] = []
            seconds = timing.wall(self.run, work)
        rate = units * self.useful / seconds
        self.run.headline(f"{storage} files, {threads} threads {rate:.0f}")
        return {
            "storage": storage,
            "threads": threads,
            "tokens_per_second": round(rate, 1),
            "share_of_dense": round(rate / self.dense, 3) if self.dense else None,
            "gigabytes_per_second": round(written[0] / 1e9 / seconds, 3),
        }


def _write(
    encoder: PromptEncoder, shared: SharedStates, tokens: Sequence[CaptionTokens], file: Path,
    budget: int,
    lock: threading.Lock,
) -> int:  # fmt: skip
    """Bytes of one unit's file."""
    with pa.OSFile(str(file), "wb") as sink:
        writer = None
        for table in encoded_tables(encoder, shared, tokens, UnitStatistics(), budget, lock):
            writer = writer or pa.ipc.new_file(sink, table.schema)
            writer.write_table(table)
        if writer is not None:
            writer.close()
    return file.stat().st_size


def part_4(run: Run) -> None:
    captions = Captions(run)
    run.report("captions", **captions.facts())
    largest = BUDGETS[-1]
    with timing.cudnn_attention(False):
        run.attempt("dense", captions.find_dense, needs=12)
        run.attempt("packed against padded", lambda: captions.agreement(largest), needs=6)
        for budget in BUDGETS[::-1]:
            _rate(run, captions, f"packed, budget {budget}", budget)
        with padded(captions.encoder):
            _rate(run, captions, "padded", largest)
        run.attempt("kernels, packed", lambda: captions.kernels(largest), needs=6)
        threads = torch.get_num_threads()
        for storage, count in (("int8", 4), ("bfloat16", 4), ("int8", 1), ("int8", 12)):
            name = f"{storage} files, {count} threads"
            run.attempt(name, lambda: captions.into_files(storage, count, largest), needs=6)  # noqa: B023
        torch.set_num_threads(threads)


def _rate(run: Run, captions: Captions, name: str, budget: int) -> None:
    found = run.attempt(name, lambda: captions.rate(budget), needs=5)
    if found:
        run.headline(f"{name} {found['share_of_dense'] or 0:.0%}")
