"""Part 4: prompt states of a random LLaMA-3-8B shape: how near to its own dense rate, and what stands between.

Legend: T caption tokens, W width.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
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

from benchmarks.embed import dense_rate, ours, public_prompts, random_encoder, random_trunk
from benchmarks.gpu import timing
from benchmarks.gpu.run import Run
from lidit.store import SharedStates, UnitStatistics, channel_statistics
from lidit.text import PromptEncoder, batching
from lidit.text.embedding import encoded_tables
from lidit.text.tokenizer import CaptionTokens

CAPTIONS, TOY_CAPTIONS = 1000, 24
BUDGETS = (8192, 16_384, 32_768)
BATCH_COSTS = (400, 1000)  # tokens that a batch costs a GPU before its first: what its planner should know
CALLS = 2  # units that an actor has in work at once
MEMORY = Path("/dev/shm")  # a file system that is no disk


class Rounded(PromptEncoder):
    """An encoder whose batches are as long as a multiple of `multiple` tokens."""

    multiple = 1

    def _padded(self, rows: Sequence[Sequence[int]]) -> torch.Tensor:
        ids = super()._padded(rows)
        missing = math.ceil(ids.shape[1] / self.multiple) * self.multiple - ids.shape[1]
        return torch.nn.functional.pad(ids, (0, missing), value=self.tokenizer.pad_id)


@contextlib.contextmanager
def batch_cost(tokens: int) -> Iterator[None]:
    """Batches planned as if each cost `tokens` before its first."""
    before, batching.BATCH_COST_TOKENS = batching.BATCH_COST_TOKENS, tokens
    try:
        yield
    finally:
        batching.BATCH_COST_TOKENS = before


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
        self.encoder = Rounded(encoder.spec, encoder.tokenizer, encoder.trunk)
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

    def rate(self, budget: int, multiple: int = 1, cost: int | None = None) -> dict[str, Any]:
        """Useful tokens/s of two passes over the captions: one that meets every batch's shape first, one after it."""
        self.encoder.multiple = multiple
        try:
            with batch_cost(cost) if cost else contextlib.nullcontext():
                work = partial(ours, self.encoder, self.ids, budget)
                first = timing.wall(self.run, work)
                second = timing.wall(self.run, work)
                batches = batching.plan_batches([len(ids) for ids in self.ids], budget)
                waste = batching.padding_of([len(ids) for ids in self.ids], batches).waste
        finally:
            self.encoder.multiple = 1
        return {
            "batches": len(batches),
            "first_seconds": round(first, 2),
            "tokens_per_second": round(self.useful / second, 1),
            "share_of_dense": round(self.useful / second / self.dense, 3) if self.dense else None,
            "padding_waste": round(waste, 3),
        }

    def kernels(self, budget: int) -> dict[str, Any]:
        """What the GPU runs in one warm pass, and how busy it is."""
        found = timing.kernels(self.run, partial(ours, self.encoder, self.ids, budget), top=8)
        self.run.headline(f"busy {found['busy']:.0%}")
        return found

    def into_files(self, storage: str, threads: int, budget: int) -> dict[str, Any]:
        """Two units at once through packing into files in memory, as an actor does it: rate end to end."""
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
                return _write(encoder, shared, self.tokens, Path(folder) / f"{number}.arrow", budget, lock)

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
    encoder: PromptEncoder, shared: SharedStates, tokens: Sequence[CaptionTokens], file: Path, budget: int,
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
    run.attempt("dense", captions.find_dense, needs=12)
    largest = BUDGETS[-1]
    _rate(run, captions, "cuDNN off", largest, cudnn=False)
    _rate(run, captions, "cuDNN on", largest, cudnn=True)
    for cost in BATCH_COSTS:
        _rate(run, captions, f"cuDNN off, a batch costs {cost}", largest, cudnn=False, cost=cost)
    _rate(run, captions, "cuDNN on, rounded to 32", largest, cudnn=True, multiple=32)
    _rate(run, captions, "cuDNN off, rounded to 32", largest, cudnn=False, multiple=32)
    with timing.cudnn_attention(False):
        run.attempt("kernels, cuDNN off", lambda: captions.kernels(largest), needs=4)
    threads = torch.get_num_threads()
    for storage, count in (("int8", 4), ("int8", 12), ("bfloat16", 4), ("int8", 1)):
        with timing.cudnn_attention(False):
            name = f"{storage} files, {count} threads"
            run.attempt(name, lambda: captions.into_files(storage, count, largest), needs=8)  # noqa: B023
    torch.set_num_threads(threads)
    for budget in BUDGETS[:-1]:
        for enabled in (False, True):
            name = f"cuDNN {'on' if enabled else 'off'}, budget {budget}"
            _rate(run, captions, name, budget, cudnn=enabled)
    _rate(run, captions, "cuDNN on, rounded to 32, a batch costs 400", largest, cudnn=True, multiple=32, cost=400)


def _rate(
    run: Run, captions: Captions, name: str, budget: int, cudnn: bool, multiple: int = 1, cost: int | None = None
) -> None:
    with timing.cudnn_attention(cudnn):
        found = run.attempt(name, lambda: captions.rate(budget, multiple, cost), needs=6)
    if found:
        run.headline(f"{name} {found['share_of_dense'] or 0:.0%}")
