"""Whatever is drawn beside it, a picture is the one that the pipeline draws alone."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from functools import cache
from random import Random

import pytest
import torch

from lidit.config import SamplerChanges
from lidit.diffusion.stepper import Padding, Row, Stepper
from lidit.pipeline import LIDiTPipeline
from lidit.pixels import unit_to_bytes
from lidit.serving import Request
from lidit.serving.admission import accept, stepper_of
from lidit.serving.loop import StepLoop
from tests.helpers.random_pipeline import random_pipeline, random_states

SCHEDULERS = {
    "ddpm": ("ddpm", "ddim", "dpm_solver"),
    "rectified_flow": ("euler", "dpm_solver"),
    "clean": ("euler", "dpm_solver"),
}
SIZES = ((16, 16), (16, 16), (16, 24))
CAP = 8
# every pass and every caption of these tests then has one shape
FIXED = Padding(rows=CAP, tokens=16)
QUICK = 30
PASSES: list[list[tuple[float, float, bool]]] = []


@dataclass(frozen=True)
class Arrival:
    """A request, the turn before which it comes, and the one before which it is cancelled."""

    request: Request
    comes: int
    cancelled: int | None


@dataclass(frozen=True)
class Schedule:
    kind: str
    cap: int
    padding: Padding
    arrivals: tuple[Arrival, ...] = field(default=())


def random_schedule(seed: int) -> Schedule:
    random = Random(seed)
    kind = random.choice(sorted(SCHEDULERS))
    arrivals = []
    for _ in range(random.randint(3, 7)):
        sampler = SamplerChanges(
            steps=random.randint(1, 6),
            guidance_scale=random.choice((1.0, 1.7, 3.0, 4.5)),
            guidance_interval=random.choice(((0.0, 1.0), (0.0, 1.0), (0.3, 0.8))),
            guidance_rescale=random.choice((0.0, 0.0, 0.7)),
            scheduler=random.choice(SCHEDULERS[kind]),
        )
        height, width = random.choice(SIZES)
        tokens = random.choice((0, 3, 9))
        seeds = [random.randrange(2**64) for _ in range(random.choice((1, 1, 2, 3)))]
        request = Request(random_states(tokens, seed=tokens), seeds, sampler, height, width)
        comes = random.randint(0, 4)
        cancelled = comes + random.randint(0, 6) if random.random() < 0.25 else None
        arrivals.append(Arrival(request, comes, cancelled))
    padding = random.choice((Padding(), Padding(rows=4, tokens=8)))
    return Schedule(kind, random.choice((2, 5, 9, 16)), padding, tuple(arrivals))


@cache
def pipeline_of(kind: str) -> LIDiTPipeline:
    return random_pipeline(kind)


class Watched(Stepper):
    """A stepper that notes the rows of its passes: (t, guidance scale, whether it guides now)."""

    def advance(self, rows: Sequence[Row], previewed: Collection[Row] = ()) -> list[torch.Tensor]:
        PASSES.append([(row.level, row.sampler.guidance_scale, row.guided) for row in rows])
        return super().advance(rows, previewed)


def drawn(schedule: Schedule) -> list[Future[torch.Tensor]]:
    """Each arrival's future, after the loop has run dry."""
    pipeline = pipeline_of(schedule.kind)
    plain = stepper_of(pipeline, schedule.padding)
    stepper = Watched(plain.model, plain.objective, plain.empty, plain.padding)
    loop = StepLoop(stepper, lambda size: schedule.cap, brisk_of=lambda size: schedule.cap // 2)
    jobs = [accept(pipeline, arrival.request) for arrival in schedule.arrivals]
    last = max(arrival.comes for arrival in schedule.arrivals)
    turn, busy = 0, True
    while busy or turn <= last:
        for job, arrival in zip(jobs, schedule.arrivals, strict=True):
            if arrival.comes == turn:
                loop.add(job)
            if arrival.cancelled == turn:
                job.future.cancel()
        busy, turn = loop.turn(), turn + 1
    assert all(job.future.done() for job in jobs)
    assert loop.units == 0
    return [job.future for job in jobs]


def alone(kind: str, request: Request) -> torch.Tensor:
    """What the plain pipeline draws: latents [n, C, H, W]."""
    pipeline, sampler = pipeline_of(kind), request.sampler
    states = {
        name: pipeline.encoders[name].collate([entry]) for name, entry in request.states.items()
    }
    images = [
        pipeline(
            states=states,
            seed=seed,
            height=request.height,
            width=request.width,
            num_inference_steps=sampler.steps,
            guidance_scale=sampler.guidance_scale,
            guidance_interval=sampler.guidance_interval,
            guidance_rescale=sampler.guidance_rescale,
            scheduler=sampler.scheduler,
            output_type="latent",
        ).images
        for seed in request.seeds
    ]
    return torch.cat(images)


def check(seed: int) -> None:
    schedule = random_schedule(seed)
    codec = pipeline_of(schedule.kind).codec
    for arrival, future in zip(schedule.arrivals, drawn(schedule), strict=True):
        if future.cancelled():
            assert arrival.cancelled is not None
            continue
        expected = alone(schedule.kind, arrival.request)
        torch.testing.assert_close(future.result(), expected, rtol=0, atol=1e-3)
        pixels = (
            unit_to_bytes(codec.decode(future.result())).int()
            - unit_to_bytes(codec.decode(expected)).int()
        )
        assert pixels.abs().max() <= 1


@pytest.mark.parametrize("seed", range(QUICK))
def test_a_picture_is_the_pipelines_own(seed: int) -> None:
    check(seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(QUICK, 200))
def test_a_picture_is_the_pipelines_own_in_many_more_schedules(seed: int) -> None:
    check(seed)


@pytest.mark.parametrize("seed", range(10))
def test_the_bytes_are_the_same_where_passes_have_one_shape(seed: int) -> None:
    schedule = replace(random_schedule(1000 + seed), cap=CAP, padding=FIXED)
    for arrival, together in zip(schedule.arrivals, drawn(schedule), strict=True):
        if not together.cancelled():
            by_itself = replace(schedule, arrivals=(replace(arrival, cancelled=None),))
            (expected,) = drawn(by_itself)
            assert torch.equal(together.result(), expected.result())


def test_schedules_mix_what_they_should() -> None:
    """The tests above prove something only if rows of unlike requests meet, and some
    are cancelled.
    """
    PASSES.clear()
    schedules = [random_schedule(seed) for seed in range(QUICK)]
    cancelled = sum(future.cancelled() for schedule in schedules for future in drawn(schedule))
    requests = [arrival.request for schedule in schedules for arrival in schedule.arrivals]
    assert {schedule.kind for schedule in schedules} == set(SCHEDULERS)
    assert {request.sampler.scheduler for request in requests} == set().union(*SCHEDULERS.values())
    assert cancelled > 10
    assert sum(len({level for level, _, _ in rows}) > 1 for rows in PASSES) > 50
    assert sum(len({scale for _, scale, guided in rows if guided}) > 1 for rows in PASSES) > 20
    assert sum(len({guided for _, _, guided in rows}) > 1 for rows in PASSES) > 20
