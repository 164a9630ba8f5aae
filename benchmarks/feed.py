"""Feeding training: this project's corpus against WebDataset tars and one npz per sample, in the
same run.

    python benchmarks/feed.py [--quick] [--batch 128]

All three hold the same bytes: latents [4, 32, 32] float32 and the bfloat16 states of captions of
varying length from two LLMs. All end at the same thing: a shuffled, collated batch of torch tensors
(latents, noise, timesteps, padded states and masks), made by 1 and by 2 workers, from the page
cache. A worker is a thread of the feed here and a process of torch's DataLoader there. Peers draw
their noise and timesteps in the workers too, without a seed per sample, and WebDataset shuffles
within a buffer, as it is used. The first pass over a corpus also checks every file's sha256; it is
reported beside the others, which is what `ratio_webdataset` compares (the smaller of the ratios of
1 and 2 workers). `ratio_int8` compares int8 states of two LLMs of width 4096 that go to the model
as they are stored with the same made float32 by the feed, by processor time. The last line printed
is one JSON object.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import webdataset
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lidit.config import DataSettings
from lidit.data.feed import Feed, open_feed
from lidit.data.order import Order, shares
from lidit.store import (
    Corpus,
    Crop,
    FamilyWriter,
    ImageReference,
    Sample,
    channel_statistics,
    latents_table,
    publish_corpus,
    publish_unit,
    shared_table,
    text_table,
    unit_tables,
)
from lidit.store.files.folder import Folder

WIDTHS = {"first": 576, "second": 640}  # SmolLM2-135M and Gemma-3-270m
WIDE = {"first": 4096, "second": 4096}  # two LLMs of 7 or 8 billion parameters
SHAPE = (4, 32, 32)  # 256 pixels through an autoencoder of factor 8
UNIT = 1024
WORKERS = (1, 2)

Content = dict[str, np.ndarray]  # latents, and the bits of each LLM's states [T, W]
Epoch = Callable[[int], Iterator[tuple[int, int]]]  # workers -> (samples, tokens) of each batch


def contents(unit: int, samples: int, widths: Mapping[str, int] = WIDTHS) -> list[Content]:
    """The samples of one unit, the same whenever they are asked for."""
    source, generator = np.random.default_rng(unit), torch.Generator().manual_seed(unit)
    long = source.normal(85, 30, samples)
    lengths = np.clip(
        np.where(source.random(samples) < 0.5, source.poisson(9, samples) + 2, long), 1, 256
    ).astype(int)
    made = []
    for tokens in lengths.tolist():
        states = {
            name: torch.randn(tokens, width, generator=generator)
            .bfloat16()
            .view(torch.uint16)
            .numpy()
            for name, width in widths.items()
        }
        made.append({"latents": torch.randn(SHAPE, generator=generator).numpy(), **states})
    return made


def write_corpus(
    folder: Path,
    units: int,
    samples: int,
    widths: Mapping[str, int] = WIDTHS,
    storage: str = "bfloat16",
) -> None:
    rows = []
    for unit in range(units):
        image = ImageReference("x.tar", "x.png")
        entries = [
            Sample(
                f"{unit}-{row}",
                ((f"caption {unit} {row}", "original"),),
                image,
                256,
                256,
                "256x256",
            )
            for row in range(samples)
        ]
        rows.append(publish_unit(Folder.at(folder), unit, 5, "x.tar", *unit_tables(entries)))
    publish_corpus(
        Folder.at(folder),
        rows,
        5,
        "/",
        pa.table({"file": ["x.tar"]}),
        {},
        {"refused": 0, "reasons": {}},
    )
    for name, width in widths.items():
        writer = FamilyWriter.open_or_create(
            str(folder), "text", name, {"storage": storage, "name": name}
        )
        one = torch.zeros(1, width, dtype=torch.bfloat16)
        statistics = channel_statistics([one, one + 1])
        writer.write_shared(shared_table([0], one, [0], one, *statistics))
        for unit in range(units):
            states = [
                torch.from_numpy(item[name]).view(torch.bfloat16)
                for item in contents(unit, samples, widths)
            ]
            ids = [[0] * len(state) for state in states]
            writer.publish(unit, text_table(ids, states, storage, width, *statistics))
        writer.finish()
    writer = FamilyWriter.open_or_create(str(folder), "latents", "codec", {"storage": "float32"})
    for unit in range(units):
        latents = [torch.from_numpy(item["latents"]) for item in contents(unit, samples)]
        writer.publish(unit, latents_table(latents, [Crop(0, 0, 256, 256)] * samples, "float32"))
    writer.finish()


def write_tars(folder: Path, units: int, samples: int) -> None:
    folder.mkdir()
    for unit in range(units):
        with tarfile.open(folder / f"{unit:05d}.tar", "w") as archive:
            for row, item in enumerate(contents(unit, samples)):
                for name, values in item.items():
                    buffer = io.BytesIO()
                    np.save(buffer, values)
                    info = tarfile.TarInfo(f"{row:05d}.{name}.npy")
                    info.size = buffer.tell()
                    buffer.seek(0)
                    archive.addfile(info, buffer)


def write_npz(folder: Path, units: int, samples: int) -> None:
    for unit in range(units):
        (folder / f"{unit:05d}").mkdir(parents=True)
        for row, item in enumerate(contents(unit, samples)):
            np.savez(folder / f"{unit:05d}" / f"{row:05d}.npz", **item)


# -- readers ---------------------------------------------------------------------------------------


def our_feed(folder: Path, batch: int) -> Callable[[int], Feed]:
    """Number of readers -> the feed; all of them share order and files."""
    settings = DataSettings(caption_dropout=0.0)
    feed = open_feed(Corpus.open(folder), settings, batch_size=batch)
    return lambda readers: Feed(
        feed.order, feed.assembler, 0, 1, settings.model_copy(update={"readers": readers})
    )


def collate(items: list[Content]) -> dict[str, torch.Tensor]:
    """What the feed makes, for the peers."""
    latents = torch.stack([torch.from_numpy(item["latents"]) for item in items])  # [B, C, H, W]
    made = {"latents": latents, "noise": torch.randn_like(latents), "u": torch.rand(len(items))}
    for name in WIDTHS:
        rows = [torch.from_numpy(item[name]).view(torch.bfloat16) for item in items]
        made[name] = pad_sequence(rows, batch_first=True)  # [B, T, W]
        lengths = torch.tensor([len(row) for row in rows])
        made[f"{name}.mask"] = torch.arange(made[name].shape[1])[None] < lengths[:, None]
    return made


def counted(batches: Any) -> Iterator[tuple[int, int]]:
    for made in batches:
        yield len(made["latents"]), sum(int(made[f"{name}.mask"].sum()) for name in WIDTHS)


def from_tar(sample: dict[str, Any]) -> Content:
    fields = ("latents", *WIDTHS)
    return {name: np.load(io.BytesIO(sample[f"{name}.npy"]), allow_pickle=False) for name in fields}


def read_tars(folder: Path, batch: int, workers: int) -> Iterator[tuple[int, int]]:
    shards = sorted(map(str, folder.glob("*.tar")))
    dataset = webdataset.WebDataset(
        shards, shardshuffle=len(shards), workersplitter=webdataset.split_by_worker, seed=0
    )
    dataset = dataset.shuffle(1000).map(from_tar).batched(batch, collation_fn=collate)
    yield from counted(webdataset.WebLoader(dataset, batch_size=None, num_workers=workers))


class NpzFiles(Dataset[Content]):
    def __init__(self, folder: Path) -> None:
        self.paths = sorted(folder.rglob("*.npz"))

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Content:
        with np.load(self.paths[index], allow_pickle=False) as file:
            return {name: file[name] for name in ("latents", *WIDTHS)}


def read_npz(folder: Path, batch: int, workers: int) -> Iterator[tuple[int, int]]:
    yield from counted(
        DataLoader(NpzFiles(folder), batch, shuffle=True, num_workers=workers, collate_fn=collate)
    )


class OurEpochs:
    """Epoch after epoch of the same feed: the first one checks every file."""

    def __init__(self, folder: Path, batch: int) -> None:
        self.feed, self.step = our_feed(folder, batch), 0

    def __call__(self, workers: int) -> Iterator[tuple[int, int]]:
        feed = self.feed(workers)
        stop = self.step + feed.order.samples_per_epoch // feed.order.batch_size
        for made in feed.batches(self.step, stop):
            yield len(made.keys), sum(int(states.mask.sum()) for states in made.text.values())
        self.step = stop


def rate(batches: Iterator[tuple[int, int]], expected: tuple[int, int]) -> float:
    """Samples per second after the first batch, which waits for workers to start."""
    samples, tokens = next(batches)
    began, first = time.perf_counter(), samples
    for more, more_tokens in batches:
        samples, tokens = samples + more, tokens + more_tokens
    seconds = time.perf_counter() - began
    if (samples, tokens) != expected:
        sys.exit(f"{samples} samples with {tokens} tokens were read, {expected} were written")
    return (samples - first) / seconds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="4 units and 3 rounds, below 5 minutes"
    )
    parser.add_argument("--batch", type=int, default=128)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    units, rounds = (4, 3) if arguments.quick else (16, 5)
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        for write, folder in ((write_corpus, "corpus"), (write_tars, "tars"), (write_npz, "npz")):
            began = time.perf_counter()
            write(work / folder, units, UNIT)
            print(f"{folder} written in {time.perf_counter() - began:.0f} s", flush=True)
        tokens = sum(
            len(item[name])
            for unit in range(units)
            for item in contents(unit, UNIT)
            for name in WIDTHS
        )
        expected = (units * UNIT, tokens)
        result = compare(work, arguments.batch, rounds, expected)
        result |= int8(work, rounds)
    print(json.dumps(result))


def units_opened(ranks: int = 64, per_node: int = 8, batch: int = 2048) -> dict[str, float]:
    """Units of a window (64 of 1,024 samples) that a rank and a node open: as batches are drawn,
    and by unit.
    """
    order = Order(np.full((256, 1), 1024), lambda unit: np.zeros(1024, np.int64), batch, 0, 64)
    steps = [order.batch(step) for step in range(64 * 1024 // batch)]
    found = {}
    for name, batches in (("drawn", steps), ("by_unit", [step.by_unit() for step in steps])):
        for who, parts in (("rank", ranks), ("node", ranks // per_node)):
            opened = [
                len(
                    {
                        int(unit)
                        for whole in batches
                        for unit in whole.slice(part.start, part.stop).unit
                    }
                )
                for part in shares(batch, parts)
            ]
            found[f"units_per_{who}_{name}"] = round(float(np.mean(opened)), 1)
    return found


def int8(work: Path, rounds: int, units: int = 4, samples: int = 64) -> dict[str, Any]:
    """Samples per second of one core, of int8 states as float32 and as they are stored."""
    write_corpus(work / "int8", units, samples, WIDE, "int8")
    settings = DataSettings(caption_dropout=0.1, readers=1)
    feeds = {
        name: open_feed(Corpus.open(work / "int8"), settings, batch_size=32, coded=coded)
        for name, coded in (("float32", False), ("as_stored", True))
    }
    rates, sizes = dict.fromkeys(feeds, 0.0), {}
    for number in range(rounds + 1):  # the first pass checks every row
        for name, feed in feeds.items():
            began, count = time.process_time(), 0
            for batch in feed.batches(0, feed.steps_per_epoch):
                count += len(batch.keys)
                sizes[name] = sum(text.states.nbytes for text in batch.text.values()) / 32
            if number:
                rates[name] = max(rates[name], count / (time.process_time() - began))
    return {
        "int8_samples_per_second_of_a_core": {n: round(found) for n, found in rates.items()},
        "int8_bytes_per_sample": {n: round(size) for n, size in sizes.items()},
        "ratio_int8": round(rates["as_stored"] / rates["float32"], 2),
    }


def compare(work: Path, batch: int, rounds: int, expected: tuple[int, int]) -> dict[str, Any]:
    samples, tokens = expected
    payload = samples * np.prod(SHAPE) * 4 + tokens / len(WIDTHS) * sum(WIDTHS.values()) * 2
    ours = OurEpochs(work / "corpus", batch)
    checked = rate(ours(1), expected)
    readers: dict[str, Epoch] = {
        "ours": ours,
        "webdataset": lambda workers: read_tars(work / "tars", batch, workers),
        "npz": lambda workers: read_npz(work / "npz", batch, workers),
    }
    rates: dict[str, dict[int, float]] = {name: dict.fromkeys(WORKERS, 0.0) for name in readers}
    for number in range(rounds):  # in turns: other work on the machine then slows all alike
        for name, epoch in readers.items():
            for workers in WORKERS:
                rates[name][workers] = max(rates[name][workers], rate(epoch(workers), expected))
        shown = ", ".join(
            f"{name} {' / '.join(f'{r:,.0f}' for r in found.values())}"
            for name, found in rates.items()
        )
        print(
            f"round {number + 1} of {rounds}: samples/s with {' / '.join(map(str, WORKERS))} "
            f"workers: {shown}",
            flush=True,
        )
    ratios = {
        peer: {
            workers: round(rates["ours"][workers] / rates[peer][workers], 2) for workers in WORKERS
        }
        for peer in ("webdataset", "npz")
    }
    return {
        "benchmark": "feed",
        "samples": samples,
        "bytes_per_sample": round(payload / samples),
        "batch": batch,
        "ratio_webdataset": min(ratios["webdataset"].values()),
        "ratio_npz": min(ratios["npz"].values()),
        "ratios_by_workers": ratios,
        "samples_per_second": {
            n: {w: round(r) for w, r in found.items()} for n, found in rates.items()
        },
        "megabytes_per_second": {
            n: {w: round(r * payload / samples / 1e6) for w, r in found.items()}
            for n, found in rates.items()
        },
        "first_pass_samples_per_second": round(checked),
        **units_opened(),
    }


if __name__ == "__main__":
    main()
