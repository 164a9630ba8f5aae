"""The engine against the plain pipeline: requests at once, and requests of unlike steps, in the
same run.

    python -m benchmarks.serving --quick

The demo's model with random weights: 32 pixels, two LLMs' states (random too, of the length of its
captions), guidance, clean-image prediction. No LLM runs and no picture is decoded on either side.

- `ratio_concurrent`: eight requests of 25 steps, given to the engine at once, against the pipeline
  called for one after the other.
- `ratio_batch`: eight clients, each of whom sends the next request when the last is answered;
  requests of 8, 16 and 32 steps, in an order that chance decided, the same on both sides. The peer
  batches statically: whatever has arrived, up to eight, is one batch, drawn by one call of the
  pipeline per number of steps and answered together. `short_p95_over_alone` says how much longer
  than alone a request of 8 steps takes at the 95th percentile, by what the process computed between
  question and answer, which is the time of a machine with nothing else to do; and by the clock.
- `steps_after_cancel`: the most steps, over many cancellations, that were taken for a cancelled
  request before the one that waited for its place took its first.
- `overhead_ms`, `first_preview_share`: over HTTP, see `benchmarks/served.py`; `--model` names a
  trained model's folder, in place of the demo's shape with random weights.

Both sides in turns, one thread of torch; a ratio is the median over rounds of the peer's processor
time over ours, which other processes on the machine do not stretch and in which nobody's waiting
counts. Latencies over HTTP are wall time. A model this small is bound by overhead per pass, not by
arithmetic: its gains say nothing about 1024 pixels, where a GPU is busy with one image. The last
line printed is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import random
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks import served
from benchmarks.model import keep_memory
from lidit.config import EncoderSettings, ModelSettings, SamplerChanges
from lidit.models import LIDiT
from lidit.pipeline import LIDiTPipeline
from lidit.pipeline.model_encoder import ModelEncoder
from lidit.serving import Engine, Request

WIDTHS = {"gemma3": 640, "smollm2": 576}
PREFIX = 30  # tokens of the instruction
PIXELS = 32
CLIENTS = 8
STEPS = (8, 16, 32)


@dataclass(eq=False)
class Asked:
    """A request as a client sees it."""

    states: dict[str, torch.Tensor]
    seed: int
    steps: int
    future: Future[torch.Tensor] = field(default_factory=Future)
    seconds: float = 0.0
    processor: float = 0.0  # seconds that the process computed meanwhile


def demo_model() -> LIDiTPipeline:
    """The demo's model, untrained; its weights are moved so that no gate is closed."""
    torch.manual_seed(0)
    model = LIDiT.from_settings(ModelSettings(), WIDTHS, 3).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    pipeline = LIDiTPipeline(
        model, {"kind": "clean"}, {"steps": 25, "guidance_scale": 2.0}, height=PIXELS, width=PIXELS
    )
    pipeline.set_progress_bar_config(disable=True)
    pipeline.encoders = {
        name: ModelEncoder(
            EncoderSettings(name=name, model="none"), {}, name, torch.randn(PREFIX, width),
            torch.randn(1, width),
            torch.zeros(width), torch.ones(width),
        )
        for name, width in WIDTHS.items()
    }  # fmt: skip
    return pipeline


def requests(count: int, steps: tuple[int, ...], seed: int) -> list[Asked]:
    """As many requests of each number of steps as of the others, in an order of chance; no two of
    one prompt.
    """
    source, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    order = [steps[number % len(steps)] for number in range(count)]
    source.shuffle(order)
    made = []
    for number, taken in enumerate(order):
        tokens = source.randint(5, 16)
        states = {
            name: torch.randn(tokens, width, generator=generator) for name, width in WIDTHS.items()
        }
        made.append(Asked(states, number, taken))
    return made


def draw(pipeline: LIDiTPipeline, asked: list[Asked]) -> torch.Tensor:
    """One call of the pipeline for requests of one number of steps."""
    states = {
        name: entry.collate([one.states[name] for one in asked])
        for name, entry in pipeline.encoders.items()
    }
    drawn: torch.Tensor = pipeline(
        states=states,
        seed=[one.seed for one in asked],
        num_inference_steps=asked[0].steps,
        output_type="latent",
    ).images
    return drawn


def submit(engine: Engine, one: Asked) -> Future[torch.Tensor]:
    return engine.submit(Request(one.states, [one.seed], SamplerChanges(steps=one.steps)))


class StaticBatches:
    """What a batching server does: one batch at a time, and its answers together."""

    def __init__(self, pipeline: LIDiTPipeline) -> None:
        self.pipeline = pipeline
        self.waiting: queue.SimpleQueue[Asked | None] = queue.SimpleQueue()
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def submit(self, one: Asked) -> Future[torch.Tensor]:
        self.waiting.put(one)
        return one.future

    def close(self) -> None:
        self.waiting.put(None)
        self.thread.join()

    def _run(self) -> None:
        while (first := self.waiting.get()) is not None:
            batch = [first]
            # the wait that batching servers have for stragglers
            deadline = time.perf_counter() + 0.01
            while len(batch) < CLIENTS:
                try:
                    more = self.waiting.get(timeout=max(deadline - time.perf_counter(), 0))
                except queue.Empty:
                    break
                if more is None:
                    self.waiting.put(None)
                    break
                batch.append(more)
            drawn = {}
            for steps in {one.steps for one in batch}:
                group = [one for one in batch if one.steps == steps]
                drawn.update(zip(group, draw(self.pipeline, group), strict=True))
            for one in batch:
                one.future.set_result(drawn[one])


def clients(asked: list[Asked], send: Callable[[Asked], Future[torch.Tensor]]) -> None:
    """CLIENTS clients get all answers; each takes the next request when its last is answered."""
    todo: queue.SimpleQueue[Asked] = queue.SimpleQueue()
    for one in asked:
        todo.put(one)

    def client() -> None:
        while True:
            try:
                one = todo.get_nowait()
            except queue.Empty:
                return
            began, computed = time.perf_counter(), time.process_time()
            send(one).result()
            one.seconds = time.perf_counter() - began
            one.processor = time.process_time() - computed

    threads = [threading.Thread(target=client) for _ in range(CLIENTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def timed(work: Callable[[], object], clock: Callable[[], float] = time.process_time) -> float:
    """Seconds that `work` takes of all threads' processor time, or of another clock."""
    began = clock()
    work()
    return clock() - began


def p95(seconds: list[float]) -> float:
    return sorted(seconds)[int(0.95 * (len(seconds) - 1) + 0.5)]


def compare(pipeline: LIDiTPipeline, engine: Engine, rounds: int, mixed: int) -> dict[str, Any]:
    one_by_one, at_once, static, loop = [], [], [], []
    alone: list[tuple[float, float]] = []  # wall and processor time
    short: dict[str, list[Asked]] = {"engine": [], "static": []}
    check(pipeline, engine)
    for number in range(rounds):
        same = requests(CLIENTS, (25,), number)
        one_by_one.append(timed(lambda same=same: [draw(pipeline, [one]) for one in same]))
        at_once.append(
            timed(
                lambda same=same: [
                    future.result() for future in [submit(engine, one) for one in same]
                ]
            )
        )
        for one in requests(4, STEPS[:1], number):
            began = time.perf_counter()
            processor = timed(lambda one=one: draw(pipeline, [one]))
            alone.append((time.perf_counter() - began, processor))
        peer = StaticBatches(pipeline)
        for which, send, found in (
            ("static", peer.submit, static),
            ("engine", lambda one: submit(engine, one), loop),
        ):
            asked = requests(mixed, STEPS, number)
            found.append(timed(lambda asked=asked, send=send: clients(asked, send)))
            short[which] += [one for one in asked if one.steps == STEPS[0]]
        peer.close()
        print(
            f"round {number + 1} of {rounds}: one by one {one_by_one[-1]:.2f} s, at once "
            f"{at_once[-1]:.2f} s; "
            f"static batches {static[-1]:.2f} s, engine {loop[-1]:.2f} s",
            flush=True,
        )
    usual, usual_processor = (statistics.median(times) for times in zip(*alone, strict=True))
    return {
        "ratio_concurrent": ratio(one_by_one, at_once),
        "ratio_batch": ratio(static, loop),
        "short_alone_seconds": round(usual, 4),
        "short_p95_over_alone": {
            which: round(p95([one.processor for one in asked]) / usual_processor, 2)
            for which, asked in short.items()
        },
        "short_p95_over_alone_wall": {
            which: round(p95([one.seconds for one in asked]) / usual, 2)
            for which, asked in short.items()
        },
        "images_per_processor_second": {
            "one_by_one": round(CLIENTS / statistics.median(one_by_one), 2),
            "at_once": round(CLIENTS / statistics.median(at_once), 2),
            "mixed_static": round(mixed / statistics.median(static), 2),
            "mixed_engine": round(mixed / statistics.median(loop), 2),
        },
    }


def after_cancel(pipeline: LIDiTPipeline, tries: int) -> dict[str, Any]:
    """One place for two requests: the first is cancelled in the middle of its steps, and the second
    moves up.
    """
    wasted, waits = [], []
    with Engine(pipeline, cap_of=lambda size: 2) as engine:
        for number in range(tries):
            first, second = requests(2, (25,), number)
            begun, moved = threading.Event(), threading.Event()
            told: dict[str, float] = {}

            def seen(
                image: int, step: int, latents: torch.Tensor, begun: threading.Event = begun
            ) -> None:
                if step == 3:
                    begun.set()

            def up(
                image: int,
                step: int,
                latents: torch.Tensor,
                moved: threading.Event = moved,
                told: dict[str, float] = told,
            ) -> None:
                if not moved.is_set():
                    told["steps"], told["at"] = engine.counts.steps, time.perf_counter()
                    moved.set()

            changes = SamplerChanges(steps=25)
            running = engine.submit(
                Request(first.states, [0], changes, previews=24, on_preview=seen)
            )
            waiting = engine.submit(
                Request(second.states, [1], changes, previews=24, on_preview=up)
            )
            begun.wait()
            steps, began = engine.counts.steps, time.perf_counter()
            running.cancel()
            moved.wait()
            waiting.cancel()
            wasted.append(int(told["steps"]) - steps - 1)  # its own first step is not wasted
            waits.append(1000 * (told["at"] - began))
    return {
        "steps_after_cancel": max(wasted),
        "place_after_cancel_ms": round(statistics.median(waits), 1),
    }


def check(pipeline: LIDiTPipeline, engine: Engine) -> None:
    """Both draw the same pictures; and what only a first call pays is paid."""
    asked = requests(CLIENTS, STEPS, 0)
    for one, future in [(one, submit(engine, one)) for one in asked]:
        torch.testing.assert_close(future.result(), draw(pipeline, [one]), rtol=0, atol=1e-3)


def ratio(theirs: list[float], ours: list[float]) -> float:
    return round(statistics.median(their / our for their, our in zip(theirs, ours, strict=True)), 3)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="three rounds, below five minutes")
    parser.add_argument(
        "--model", type=Path, help="a trained model's folder, for the part over HTTP"
    )
    parser.add_argument("--part", choices=["all", "engine", "http"], default="all")
    arguments = parser.parse_args()
    rounds, mixed = (3, 48) if arguments.quick else (15, 96)
    torch.set_num_threads(1)
    keep_memory()
    found: dict[str, Any] = {"threads": torch.get_num_threads(), "torch": torch.__version__}
    if arguments.part != "http":
        pipeline = demo_model()
        found["parameters"] = sum(parameter.numel() for parameter in pipeline.model.parameters())
        with Engine(pipeline, sizes=[(PIXELS, PIXELS)]) as engine:
            found["row_cap"], found["brisk_rows"] = engine.row_cap(), engine.row_cap(brisk=True)
            found |= compare(pipeline, engine, rounds, mixed)
        found |= after_cancel(pipeline, 10 * rounds)
    if arguments.part != "engine":
        os.environ["OMP_NUM_THREADS"] = "1"  # of the platform's processes, too
        with tempfile.TemporaryDirectory() as folder:
            model = arguments.model or served.demo_folder(Path(folder))
            found |= served.measure(model, Path(folder), 10 * rounds)
    print(json.dumps({"benchmark": "serving", "peer": "LIDiTPipeline", **found}))


if __name__ == "__main__":
    main()
