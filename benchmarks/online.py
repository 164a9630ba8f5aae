"""States computed beside training, at the shape of large runs: encoders and trainers that sleep,
real files, shrunk.

    python -m benchmarks.online --quick

512 trainers of 10B at 512 pixels and 64 of 1B at 256, with as many encoders and windows ahead as
`lidit plan` says. A step and a unit take as long as the plan says, all stretched by one factor, so
that two CPU cores can write and read the files. The producer, its budget and its janitor, the
readers' waiting, checksums and credits are the real ones; a node of eight trainers is one reader.
The peer is the same run with half the encoders. `--quick` leaves the smaller run out: before its
first step 192 units have to be there. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import heapq
import json
import math
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from lidit.config import DataSettings, OnlineSettings, Recipe
from lidit.data.credit import Credit, CreditKeeper
from lidit.data.feed import Feed
from lidit.data.order import GlobalBatch
from lidit.data.producer import Finished, Producer, State, Work
from lidit.data.rows import Rows
from lidit.plan import make_plan
from lidit.plan.facts import gather_facts
from lidit.store import (
    Corpus,
    FamilyWriter,
    ImageReference,
    Sample,
    TextFamily,
    publish_corpus,
    publish_unit,
    shared_table,
    text_table,
    unit_tables,
)
from lidit.store.files.folder import Folder
from lidit.store.janitor import announce_rolling

LLMS = {
    "llama3": {"width": 4096, "blocks": 32, "block_parameters": 218_112_000},
    "qwen": {"width": 4096, "blocks": 32, "block_parameters": 202_387_456},
}
BATCH, UNIT, WINDOW_UNITS = 4096, 1024, 16
SHRUNK = 8  # samples of a unit and of a batch are divided by it: their ratio stays
NODE = 8
WIDTH = 8
# name -> model, pixels, trainers
SHAPES = {"10b_512": ("10B", 512, 512), "1b_256": ("1B", 256, 64)}


@dataclass(frozen=True)
class Shape:
    """One large run. step_seconds, unit_seconds: as planned; encoders, ahead: what the plan
    advises.
    """

    name: str
    trainers: int
    step_seconds: float
    unit_seconds: float
    encoders: int
    ahead: int


def planned(name: str, preset: str, pixels: int, trainers: int) -> Shape:
    recipe = Recipe.model_validate(
        {
            "name": name,
            "corpus": "nowhere",
            "encoders": [{"name": llm, "model": f"models/{llm}",
                          "storage": "int8"} for llm in LLMS],
            "codec": {"name": "vae", "model": "models/vae", "posterior": "mean"},
            "model": {"preset": preset},
            "data": {"window_units": WINDOW_UNITS},
            "train": {"batch_size": BATCH, "steps": 100_000},
            "plan": {"samples": 10**9, "caption_tokens": 100, "prefix_tokens": 40, "encoders": LLMS,
                     "gpus": trainers,
                     "latent": [4, pixels // 8, pixels // 8]},
        }
    )  # fmt: skip
    facts = gather_facts(recipe)
    plan = make_plan(recipe, facts)
    unit_seconds = 3600 * sum(plan.embed_gpu_hours.values()) / facts.samples * UNIT
    encoders = math.ceil(plan.states.encoders_per_trainer * trainers)
    return Shape(name, trainers, plan.seconds_per_step, unit_seconds, encoders, plan.states.ahead)


class SleepingEncoders:
    """Encoders that take `seconds` for a unit and then publish a small one."""

    def __init__(self, writer: FamilyWriter, encoders: int, seconds: float) -> None:
        self.writer, self.seconds = writer, seconds
        self._free = [0.0] * encoders
        self._running: list[tuple[float, int]] = []
        shared = writer.shared()
        assert shared
        states = [torch.full((2, WIDTH), 1.0)] * (UNIT // SHRUNK)
        ids = [[1, 2]] * len(states)
        self.table = text_table(ids, states, "float32", WIDTH, shared.mean, shared.deviation)

    @property
    def actors(self) -> int:
        return len(self._free)

    @property
    def slots(self) -> int:
        return 2 * self.actors - len(self._running)

    def start(self, unit: int) -> None:
        done = max(time.monotonic(), heapq.heappop(self._free)) + self.seconds
        heapq.heappush(self._free, done)
        heapq.heappush(self._running, (done, unit))

    def finished(self, seconds: float) -> list[Finished]:
        until = time.monotonic() + seconds
        if self._running:
            until = min(until, self._running[0][0])
        time.sleep(max(0.0, until - time.monotonic()))  # the encoder's work
        found = []
        while self._running and self._running[0][0] <= time.monotonic():
            _, unit = heapq.heappop(self._running)
            self.writer.publish(unit, self.table)
            found.append(Finished(unit))
        return found

    def resize(self, actors: int) -> None:
        raise NotImplementedError("the plan says how many there are")


class TextRows:
    """Reads the text of a batch, as `Assembler` does."""

    def __init__(self, family: TextFamily) -> None:
        self.family = family

    def assemble(self, batch: GlobalBatch) -> int:
        for unit in set(batch.unit.tolist()):
            self.family.verify_unit(unit)
            self.family.read(unit, batch.row[batch.unit == unit].tolist())
        return batch.step


def make_corpus(folder: Path, units: int) -> Corpus:
    made = []
    for unit in range(units):
        samples = [
            Sample(
                f"{unit}-{row}",
                ((f"{unit} {row}", "original"),),
                ImageReference("a.tar", "b"),
                32,
                32,
                "32x32",
            )
            for row in range(UNIT // SHRUNK)
        ]
        made.append(publish_unit(Folder.at(folder), unit, 5, f"{unit}.tar", *unit_tables(samples)))
    sources = pa.table({"file": [f"{unit}.tar" for unit in range(units)]})
    return publish_corpus(Folder.at(folder), made, 5, "/nowhere", sources, {}, {"refused": 0})


def run(
    shape: Shape, folder: Path, steps: int, stretched_step: float, encoders: int
) -> dict[str, float]:
    """Seconds that training waits for data, as a share of its time; the most units on disk."""
    stretch = stretched_step / shape.step_seconds
    units = -(-steps * BATCH // UNIT // WINDOW_UNITS) * WINDOW_UNITS
    corpus = make_corpus(folder, units)
    writer = FamilyWriter.open_or_create(
        str(folder), "text", "slept", {"storage": "float32", "width": WIDTH}
    )
    one = torch.ones(2, WIDTH)
    writer.write_shared(
        shared_table([1, 2], one, [1], one[:1], torch.zeros(WIDTH), torch.ones(WIDTH))
    )
    announce_rolling(writer, 3600.0, {})

    data = DataSettings(window_units=WINDOW_UNITS, prefetch_batches=4)
    rows, batch = Rows(corpus, data), BATCH // SHRUNK
    online = OnlineSettings(ahead=shape.ahead, patience=3600.0)
    given = Credit("run", data.seed, WINDOW_UNITS, batch, 0.0, 0, steps)
    stop, states = threading.Event(), list[State]()
    pool = SleepingEncoders(writer, encoders, shape.unit_seconds * stretch)
    producer = Producer(Work(writer, online, given), pool, states.append)
    thread = threading.Thread(target=producer.run, args=(stop,), daemon=True)
    began = time.monotonic()
    thread.start()
    # A run begins when the first windows are there: what that takes is paid once, and told apart.
    while not (states and states[-1].ahead >= shape.ahead):
        time.sleep(0.05)  # between two looks at what the producer has told
    filled = time.monotonic() - began

    nodes = shape.trainers // NODE
    order = rows.order(batch)
    keeper = CreditKeeper([writer.folder], given, order.window_of, online.patience)
    waits = [[0.0] * steps for _ in range(nodes)]
    together, most = threading.Barrier(nodes), 0

    failures: list[Exception] = []

    def node(rank: int) -> None:
        try:
            train(rank)
        except Exception as error:
            failures.append(error)
            together.abort()

    def train(rank: int) -> None:
        nonlocal most
        family = Corpus.open(folder).text_family("slept", rolling=True, keep_open=2 * WINDOW_UNITS)
        feed = Feed(rows.order(batch), TextRows(family), rank, nodes, data)
        before = 0.0
        for step in feed.batches(0, steps):
            waits[rank][step], before = feed.waited - before, feed.waited
            together.wait()
            time.sleep(stretched_step)  # the trainer's work
            if rank == 0:
                keeper.advance(step + 1, stretched_step)
                if step % 20 == 19:
                    keeper.saved(step + 1)
                most = max(most, len(producer.present))

    threads = [threading.Thread(target=node, args=(rank,)) for rank in range(nodes)]
    began = time.monotonic()
    for one_node in threads:
        one_node.start()
    for one_node in threads:
        one_node.join()
    if failures:
        raise failures[0]
    took = time.monotonic() - began
    keeper.saved(steps)
    keeper.close()
    stop.set()
    thread.join()
    # All trainers wait for the slowest of them. The first steps fill the reading threads' queue.
    waited = sum(max(node_waits[step] for node_waits in waits) for step in range(4, steps))
    return {
        "wait_share": round(waited / took, 4),
        "first_windows_seconds": round(filled / stretch, 1),
        "most_units": most,
        "wanted_encoders": max(state.wanted_actors for state in states),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--quick", action="store_true", help="10b_512 with fewer and shorter steps, in 5 minutes"
    )
    parser.add_argument("--only", choices=SHAPES, help="one of the runs")
    parser.add_argument("--step", type=float, default=2.0, help="seconds a step is stretched to")
    arguments = parser.parse_args()
    steps, seconds = (40, 1.2) if arguments.quick else (160, arguments.step)
    names = [arguments.only] if arguments.only else list(SHAPES)[: 1 if arguments.quick else None]
    results: dict[str, Any] = {"left_out": [name for name in SHAPES if name not in names]}
    for name in names:
        preset, pixels, trainers = SHAPES[name]
        shape = planned(name, preset, pixels, trainers)
        print(
            f"{name}: {trainers} trainers, a step takes {shape.step_seconds:.3f} s, a unit "
            f"{shape.unit_seconds:.2f} s; "
            f"planned: {shape.encoders} encoders, {shape.ahead} windows ahead"
        )
        for label, encoders in (("planned", shape.encoders), ("half", shape.encoders // 2)):
            with tempfile.TemporaryDirectory() as folder:
                found = run(shape, Path(folder) / "corpus", steps, seconds, encoders)
            print(f"  {label}: {encoders} encoders, {found}", flush=True)
            results[f"wait_share_{name}_{label}"] = found["wait_share"]
        results[f"encoders_{name}"] = shape.encoders
        results[f"ahead_{name}"] = shape.ahead
    print(json.dumps(results))


if __name__ == "__main__":
    main()
