"""The engine in its thread: many callers, cancellation, previews, failures and the end."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from threading import Event

import pytest
import torch

from lidit.config import SamplerChanges
from lidit.errors import InputError, JobError
from lidit.pipeline import LIDiTPipeline
from lidit.serving import Engine, Request
from lidit.serving.request import OnPreview
from tests.helpers.random_pipeline import random_pipeline, random_states

STATES = random_states(5, 1)


@pytest.fixture
def pipeline() -> LIDiTPipeline:
    return random_pipeline("clean")


@pytest.fixture
def engine(pipeline: LIDiTPipeline) -> Iterator[Engine]:
    with Engine(pipeline, cap_of=lambda size: 8) as engine:
        yield engine


def gate(steps: int = 3) -> tuple[Request, Event, Event]:
    """A request that holds the engine at its first preview: the events say that it is there, and
    let it go on.
    """
    there, go = Event(), Event()

    def wait(place: int, step: int, latents: torch.Tensor) -> None:
        there.set()
        assert go.wait(60)

    return Request(STATES, [0], SamplerChanges(steps=steps), previews=1, on_preview=wait), there, go


def test_callers_in_many_threads_get_the_pipelines_pictures(
    engine: Engine, pipeline: LIDiTPipeline
) -> None:
    def draw(number: int) -> torch.Tensor:
        request = Request(
            random_states(number, number),
            [number, number + 1],
            SamplerChanges(steps=1 + number % 4),
        )
        return engine.submit(request).result(60)

    with ThreadPoolExecutor(8) as callers:
        drawn = list(callers.map(draw, range(16)))
    for number, latents in enumerate(drawn):
        states = {
            name: pipeline.encoders[name].collate([entry] * 2)
            for name, entry in random_states(number, number).items()
        }
        expected = pipeline(
            states=states,
            seed=[number, number + 1],
            num_inference_steps=1 + number % 4,
            output_type="latent",
        ).images
        torch.testing.assert_close(latents, expected, rtol=0, atol=1e-3)
    assert engine.counts.finished == 16
    assert engine.counts.steps == sum(2 * (1 + number % 4) for number in range(16))


def test_nothing_is_computed_for_a_cancelled_request(engine: Engine) -> None:
    """Cancelled by its own preview after step 2 of 9; and, while another holds the engine, before
    its first step.
    """
    futures: list[Future[torch.Tensor]] = []
    known = Event()

    def cancel(place: int, step: int, latents: torch.Tensor) -> None:
        assert known.wait(60)
        futures[0].cancel()

    request = Request(STATES, [0], SamplerChanges(steps=9), previews=4, on_preview=cancel)
    futures.append(engine.submit(request))
    known.set()
    with pytest.raises(CancelledError):
        futures[0].result(60)
    held, there, go = gate()
    last = engine.submit(held)
    assert there.wait(60)
    waiting = engine.submit(Request(STATES, [1, 2]))
    assert waiting.cancel()
    go.set()
    last.result(60)
    engine.submit(Request(STATES, [3], SamplerChanges(steps=1))).result(60)
    assert (engine.counts.steps, engine.counts.cancelled) == (2 + 3 + 1, 2)


def test_a_short_request_is_not_held_up_by_long_ones(pipeline: LIDiTPipeline) -> None:
    """With one place in a pass it takes every other one, the oldest of the long ones the rest."""
    order: list[tuple[str, int]] = []

    def told(name: str) -> OnPreview:
        return lambda place, step, latents: order.append((name, step))

    def asked(name: str, steps: int) -> Request:
        changes = SamplerChanges(steps=steps)
        return Request(STATES, [0], changes, previews=steps - 1, on_preview=told(name))

    with Engine(pipeline, cap_of=lambda size: 2) as engine:
        held, there, go = gate(steps=2)
        engine.submit(held)
        assert there.wait(60)
        long = [engine.submit(asked(name, 20)) for name in ("first", "second")]
        short = engine.submit(asked("short", 5))
        go.set()
        short.result(60)
        while_short = list(order)
        for future in long:
            future.result(60)
    assert [step for name, step in while_short if name == "short"] == [1, 2, 3, 4]
    steps = {name: sum(who == name for who, _ in while_short) for name in ("first", "second")}
    assert 3 <= steps["first"] <= 6
    assert steps["second"] == 0


def test_previews_come_at_equal_distances_and_before_the_end(engine: Engine) -> None:
    shown: list[tuple[int, int]] = []

    def show(place: int, step: int, latents: torch.Tensor) -> None:
        assert latents.shape == (3, 16, 16)
        shown.append((place, step))

    request = Request(STATES, [0, 1], SamplerChanges(steps=8), previews=3, on_preview=show)
    engine.submit(request).result(60)
    assert sorted(shown) == [(place, step) for place in (0, 1) for step in (2, 4, 6)]


def test_a_preview_that_raises_ends_its_request_alone(engine: Engine) -> None:
    def broken(place: int, step: int, latents: torch.Tensor) -> None:
        raise RuntimeError("nobody listens")

    failing = engine.submit(Request(STATES, [0], previews=1, on_preview=broken))
    with pytest.raises(RuntimeError, match="nobody listens"):
        failing.result(60)
    engine.submit(Request(STATES, [0])).result(60)
    assert (engine.counts.failed, engine.counts.finished) == (1, 1)


def test_a_step_that_fails_ends_the_images_in_it_alone(
    engine: Engine, pipeline: LIDiTPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    held, there, go = gate()
    first = engine.submit(held)
    assert there.wait(60)
    large = engine.submit(Request(STATES, [0], height=32, width=32))
    fine = engine.submit(Request(STATES, [0]))

    def no_memory(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        if inputs[0].shape[-1] == 32:
            raise torch.OutOfMemoryError("out of memory")

    pipeline.model.transformer.register_forward_pre_hook(no_memory)
    go.set()
    with pytest.raises(torch.OutOfMemoryError):
        large.result(60)
    assert torch.isfinite(first.result(60)).all()
    assert torch.isfinite(fine.result(60)).all()


@pytest.mark.parametrize("error", [RuntimeError("no profile"), ValueError("bad size")])
def test_a_size_without_a_cap_fails_and_the_engine_goes_on(
    pipeline: LIDiTPipeline, error: Exception
) -> None:
    def cap_of(size: tuple[int, int]) -> int:
        if size == (32, 32):
            raise error
        return 4

    with Engine(pipeline, cap_of=cap_of) as engine:
        with pytest.raises(type(error), match=str(error)):
            engine.submit(Request(STATES, [0], height=32, width=32)).result(60)
        engine.submit(Request(STATES, [0])).result(60)


def submit_until_refused(engine: Engine) -> None:
    """Until another thread has reached `close`."""
    while True:
        engine.submit(Request(STATES, [9])).cancel()


def test_closing_cancels_or_drains_and_refuses_what_comes_after(pipeline: LIDiTPipeline) -> None:
    for drain in (False, True):
        engine = Engine(pipeline, cap_of=lambda size: 1)
        held, there, go = gate()
        futures = [engine.submit(held)]
        assert there.wait(60)
        futures += [engine.submit(Request(STATES, [seed])) for seed in range(3)]
        with ThreadPoolExecutor(1) as other:
            closing = other.submit(engine.close, drain)
            with pytest.raises(JobError, match="closed"):
                submit_until_refused(engine)
            go.set()
            closing.result(60)
        assert all(future.done() for future in futures)
        assert [future.cancelled() for future in futures] == [not drain] * len(futures)
        assert engine.units == 0


def test_units_are_the_pixels_and_steps_that_are_left(engine: Engine) -> None:
    # guided: two rows of 16 x 16 pixels; held after the second step
    held, there, go = gate(steps=4)
    first = engine.submit(held)
    assert there.wait(60)
    second = engine.submit(
        Request(STATES, [0, 1], SamplerChanges(steps=5, guidance_scale=1), 32, 16)
    )
    assert engine.units == 2 * 3 * 256 + 5 * 2 * 512  # of the first as of the turn before
    go.set()
    first.result(60)
    second.result(60)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": []}, "at least one seed"),
        ({"seeds": [2**64]}, r"\(64 bits\)"),
        ({"height": 18}, "must be multiples of 4"),
        (
            {"sampler": SamplerChanges(scheduler="ddim")},
            "'ddim' cannot sample the objective 'clean'",
        ),
        ({"previews": -1}, "-1 previews"),
        ({"states": {"first": STATES["first"]}}, r"states of \['second'\] are missing"),
        (
            {"states": {**STATES, "first": torch.randn(3, 9)}},
            "states are 9 wide, the model expects 12",
        ),
        (
            {"states": {**STATES, "first": torch.randn(1, 3, 12)}},
            r"\[tokens, width\], got \[1, 3, " r"12\]",
        ),
    ],
)
def test_what_cannot_be_drawn_is_refused_at_once(
    engine: Engine, changes: dict, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        engine.submit(Request(**{"states": STATES, "seeds": [0], **changes}))
    assert engine.counts.passes == 0


def test_a_request_alone_takes_the_pipelines_passes(pipeline: LIDiTPipeline) -> None:
    """One a step, of two rows where it guides; the row caps are measured here, which counts as no
    work.
    """
    with Engine(pipeline, sizes=[(16, 16)]) as engine:
        engine.submit(Request(STATES, [0], SamplerChanges(steps=3))).result(60)
    assert (engine.counts.passes, engine.counts.steps, engine.counts.rows) == (3, 3, 6)
