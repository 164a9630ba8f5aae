"""Storing and reading prompt states: this project's shards against the formats other caches use, in
the same run.

    python -m benchmarks.store --quick

All formats hold the same bfloat16 bits of the same captions of varying length. Peers: npz per
sample (PixArt, Kohya), WebDataset tars of .npy members, Parquet, safetensors per unit. Reading ends
where training starts: every caption's states copied into a batch buffer as a torch tensor.
`read_over_raw` is reading all tensors of a unit into one buffer against reading its file's bytes
into the same buffer with readinto(), both from the page cache. The last line printed is one JSON
object.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import os
import random
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from lidit.store import (
    Corpus,
    FamilyWriter,
    Sample,
    TextFamily,
    channel_statistics,
    publish_corpus,
    publish_unit,
    shared_table,
    text_table,
    unit_tables,
)
from lidit.store.files.folder import Folder
from lidit.store.text_file import TextFile

WIDTH = 576  # SmolLM2-135M
UNIT = 1024
LONGEST = 256
PADDED = 300  # what fixed-length caches keep per caption
RANDOM_READS = 4096

States = list[torch.Tensor]
Rows = list[tuple[int, int]]


def synthetic(captions: int, seed: int = 0) -> States:
    """bfloat16 states with the lengths of half short, half long captions and channels of very
    different scale.
    """
    source = np.random.default_rng(seed)
    short, long = (
        source.poisson(9, captions // 2) + 2,
        source.normal(85, 30, captions - captions // 2),
    )
    lengths = np.clip(np.concatenate([short, long]), 1, LONGEST).astype(int)
    source.shuffle(lengths)
    generator = torch.Generator().manual_seed(seed)
    scale = torch.logspace(-1, 3, WIDTH)
    return [(torch.randn(int(n), WIDTH, generator=generator) * scale).bfloat16() for n in lengths]


def timed(action: Callable[[], Any]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def best(action: Callable[[], Any], times: int = 3) -> float:
    return min(timed(action) for _ in range(times))


class Consumer:
    """A batch buffer that states are copied into, as a collator does."""

    def __init__(self) -> None:
        self.buffer = torch.zeros(64, LONGEST, WIDTH, dtype=torch.bfloat16)
        self.place = 0

    def take(self, states: torch.Tensor) -> None:
        self.buffer[self.place % 64, : len(states)] = states
        self.place += 1


# -- formats: write(folder, units), sequential(folder), random(folder, rows) -----------------------


def bits(state: torch.Tensor) -> np.ndarray:
    return state.view(torch.uint16).numpy()


def from_bits(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(values).view(torch.bfloat16)


def write_npz(folder: Path, units: list[States]) -> None:
    for unit, states in enumerate(units):
        (folder / f"{unit:05d}").mkdir()
        for row, state in enumerate(states):
            np.savez(folder / f"{unit:05d}" / f"{row:05d}.npz", states=bits(state))


def read_npz(folder: Path, rows: Iterable[tuple[int, int]], consumer: Consumer) -> None:
    for unit, row in rows:
        with np.load(folder / f"{unit:05d}" / f"{row:05d}.npz", allow_pickle=False) as file:
            consumer.take(from_bits(file["states"]))


def write_tars(folder: Path, units: list[States]) -> None:
    for unit, states in enumerate(units):
        with tarfile.open(folder / f"{unit:05d}.tar", "w") as archive:
            for row, state in enumerate(states):
                buffer = io.BytesIO()
                np.save(buffer, bits(state))
                info = tarfile.TarInfo(f"{row:05d}.npy")
                info.size = buffer.tell()
                buffer.seek(0)
                archive.addfile(info, buffer)


def read_tars(folder: Path, consumer: Consumer) -> None:
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path, "r|") as archive:
            for member in archive:
                content = archive.extractfile(member)
                assert content is not None
                consumer.take(from_bits(np.load(io.BytesIO(content.read()), allow_pickle=False)))


def write_parquet(folder: Path, units: list[States]) -> None:
    for unit, states in enumerate(units):
        table = text_table([[0] * len(s) for s in states], states, "bfloat16")
        pq.write_table(table.select(["tokens", "states"]), folder / f"{unit:05d}.parquet")


def read_parquet(folder: Path, consumer: Consumer) -> None:
    for path in sorted(folder.glob("*.parquet")):
        column = pq.read_table(path, columns=["states"])["states"]
        for chunk in column.chunks:
            values, offsets = chunk.values.to_numpy(), chunk.offsets.to_numpy()
            for start, stop in itertools.pairwise(offsets):
                consumer.take(from_bits(values[start:stop].copy()).view(-1, WIDTH))


def write_safetensors(folder: Path, units: list[States]) -> None:
    for unit, states in enumerate(units):
        save_file(
            {f"{row:05d}": state for row, state in enumerate(states)},
            folder / f"{unit:05d}.safetensors",
        )


def read_safetensors(folder: Path, consumer: Consumer) -> None:
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  (not a mapping)
                consumer.take(file.get_tensor(name))


def random_safetensors(folder: Path, rows: Rows, consumer: Consumer) -> None:
    opened = {}
    for unit, row in rows:
        if unit not in opened:
            opened[unit] = safe_open(folder / f"{unit:05d}.safetensors", framework="pt")
        consumer.take(opened[unit].get_tensor(f"{row:05d}"))


# -- ours ------------------------------------------------------------------------------------------


def make_corpus(folder: Path, captions_per_unit: list[int]) -> Corpus:
    place = Folder.at(folder)
    rows = []
    for unit, count in enumerate(captions_per_unit):
        samples = [
            Sample(f"{unit}-{row}", ((f"caption {unit} {row}", "original"),))
            for row in range(count)
        ]
        rows.append(publish_unit(place, unit, 5, f"{unit}.txt", *unit_tables(samples)))
    return publish_corpus(
        place, rows, 5, "/", pa.table({"file": ["x"]}), {}, {"refused": 0, "reasons": {}}
    )


def open_writer(corpus: Path, storage: str) -> FamilyWriter:
    return FamilyWriter.open_or_create(str(corpus), "text", storage, {"storage": storage})


def write_ours(corpus: Path, units: list[States], storage: str) -> None:
    writer = open_writer(corpus, storage)
    mean, deviation = channel_statistics(units[0][:256])
    one = torch.zeros(1, units[0][0].shape[1])
    shared = writer.write_shared(shared_table([0], one, [0], one, mean, deviation))
    for unit, states in enumerate(units):
        ids = [[0] * len(s) for s in states]
        writer.publish(unit, text_table(ids, states, storage, None, shared.mean, shared.deviation))
    writer.finish()


def read_ours(family: TextFamily, consumer: Consumer) -> None:
    for unit in range(family.corpus.num_units):
        for states in family.read(unit):
            consumer.take(states)


def stream_ours(family: TextFamily, consumer: Consumer) -> None:
    """As from an object store: the whole file in memory first."""
    shared = family.shared()
    for file in family.records["file"].to_pylist():
        content = bytearray((family.folder.path / file).stat().st_size)
        with (family.folder.path / file).open("rb", buffering=0) as opened:
            opened.readinto(content)
        for states in TextFile.load(content, file).states(None, shared.mean, shared.deviation):
            consumer.take(states)


def random_ours(family: TextFamily, rows: Rows, consumer: Consumer) -> None:
    for unit, row in rows:
        consumer.take(family.read(unit, [row])[0])


def gather_ours(family: TextFamily, buffer: torch.Tensor) -> None:
    """Every tensor of a unit copied into one buffer: all bytes are read, and nothing else is
    measured.
    """
    for unit in range(family.corpus.num_units):
        states = family.read(unit)
        torch.cat(states, out=buffer[: sum(len(s) for s in states)])


def read_raw(paths: list[Path], target: torch.Tensor) -> None:
    """The files' bytes into the same buffer."""
    buffer = memoryview(target.view(torch.uint8).numpy().reshape(-1))
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def compare(work: Path, captions: int) -> dict[str, Any]:
    """Write and read rates of every format, MB of states per second."""
    everything = synthetic(captions)
    units = [everything[i : i + UNIT] for i in range(0, captions, UNIT)]
    payload = sum(state.numel() * 2 for state in everything) / 1e6
    rows = [(unit, row) for unit, states in enumerate(units) for row in range(len(states))]
    shuffled = random.Random(0).sample(rows, min(RANDOM_READS, len(rows)))
    part = sum(units[u][r].numel() * 2 for u, r in shuffled) / 1e6
    corpus = make_corpus(work / "corpus", [len(states) for states in units]).folder.path
    results: dict[str, dict[str, float]] = {}

    def report(name: str, folder: Path, **rates: float) -> None:
        results[name] = {
            **{k: round(v, 1) for k, v in rates.items()},
            "bytes_per_caption": size_of(folder) // captions,
        }
        print(
            f"  {name:<22}"
            + "".join(f"{key} {value:>9,.1f}   " for key, value in results[name].items()),
            flush=True,
        )

    print(
        f"{captions} captions, {payload:.0f} MB of bfloat16 states; rates in MB of states per "
        "second"
    )
    for storage in ("bfloat16", "int8"):
        seconds = timed(lambda s=storage: write_ours(corpus, units, s))
        family = Corpus.open(corpus).text_family(storage)
        report(
            f"ours {storage}",
            family.folder.path,
            write=payload / seconds,
            sequential=payload / best(lambda f=family: read_ours(f, Consumer())),
            streamed=payload / best(lambda f=family: stream_ours(f, Consumer())),
            random=part / best(lambda f=family: random_ours(f, shuffled, Consumer())),
            verified=payload
            / timed(lambda f=family: [f.verify_unit(u) for u in range(len(units))]),
        )
    peers: list[tuple[str, Any, Any, Any]] = [
        ("npz per sample", write_npz, lambda f, c: read_npz(f, rows, c), read_npz),
        ("WebDataset tar", write_tars, read_tars, None),
        ("Parquet", write_parquet, read_parquet, None),
        ("safetensors per unit", write_safetensors, read_safetensors, random_safetensors),
    ]
    for name, write, sequential, at_random in peers:
        folder = work / name.replace(" ", "-")
        folder.mkdir()
        rates = {"write": payload / timed(lambda w=write, f=folder: w(f, units))}
        rates["sequential"] = payload / best(lambda s=sequential, f=folder: s(f, Consumer()))
        if at_random is not None:
            rates["random"] = part / best(lambda r=at_random, f=folder: r(f, shuffled, Consumer()))
        report(name, folder, **rates)
    ours = Corpus.open(corpus).text_family("bfloat16")
    paths = [ours.folder.path / file for file in ours.records["file"].to_pylist()]
    # In turns: other work on the machine then slows both alike.
    buffer = torch.zeros(
        max(path.stat().st_size for path in paths) // WIDTH // 2 + 1, WIDTH, dtype=torch.bfloat16
    )
    turns = [
        (timed(lambda: read_raw(paths, buffer)), timed(lambda: gather_ours(ours, buffer)))
        for _ in range(9)
    ]
    raw = sum(path.stat().st_size for path in paths) / 1e6 / min(turn[0] for turn in turns)
    gathered = payload / min(turn[1] for turn in turns)
    sequential = results["ours bfloat16"]["sequential"]
    padded = PADDED * WIDTH * 2
    print(f"  whole units {gathered:,.0f} MB/s, raw bytes {raw:,.0f} MB/s")
    print(f"  a cache padded to {PADDED} tokens needs {padded:,} bytes per caption")
    return {
        "formats": results,
        "raw_read": round(raw, 1),
        "unit_read": round(gathered, 1),
        "read_over_raw": round(gathered / raw, 3),
        "padded_bytes_per_caption": padded,
        "smaller_than_padded": {
            storage: round(padded / results[f"ours {storage}"]["bytes_per_caption"], 2)
            for storage in ("bfloat16", "int8")
        },
        "read_over_peers": {
            n: round(sequential / r["sequential"], 2) for n, r in results.items() if "ours" not in n
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="fewer captions; ends within 5 minutes on 2 cores"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="store-benchmark-") as name:
        work = Path(name)
        result: dict[str, Any] = {
            "benchmark": "store",
            "quick": arguments.quick,
            "cores": os.cpu_count(),
        }
        result |= compare(work, 4096 if arguments.quick else 16_384)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
