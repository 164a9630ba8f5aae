"""Latents over many machines: decode on CPU tasks, encode on an actor pool, one family file per
unit.

Ray tasks and actors rather than a Ray Data pipeline: one actor must see all of a unit to publish
it, and a unit's pixels need not fit in memory. So each actor takes its unit's chunks through a
short window of decode tasks that runs ahead into its next unit, and the codec never waits for a
picture. Where actors hold every CPU of a cluster no such task can start, and a blocked actor gives
none back: then its chunks are decoded on its own node, beside it. Few units for one actor are
computed in this process, without Ray.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from lidit.codecs import Codec, codec_spec, load_codec
from lidit.codecs.encoding import LatentEncoder, Pixels, check_buckets, unit_chunks
from lidit.config import CodecSettings, PoolSettings
from lidit.errors import InputError, JobError
from lidit.progress import SILENT, Progress
from lidit.sources.reading import bucket_images
from lidit.store import Corpus, FamilyWriter, UnitStatistics, spec_differences
from pipelines.runtime import resources

WINDOW = 4  # chunks decoded ahead of the codec
DECODE_PATIENCE = 15.0  # seconds an actor waits for a chunk before it is decoded beside it as well
ACTOR_RESTARTS = 3
# ACTOR_RESTARTS is the real limit: until Ray notices a lost node, each retry fails at once
TASK_RETRIES = -1


@dataclass(frozen=True)
class LatentsSummary:
    """One finished latents family.

    computed_units: by this call; encode_seconds: the actors' time over them, without start-up;
    codec_busy: the share of it spent in the codec.
    """

    name: str
    directory: str
    fingerprint: str
    units: int
    computed_units: int
    images: int
    bytes: int
    seconds: float
    encode_seconds: float
    codec_busy: float


@dataclass(frozen=True)
class LatentsJob:
    """What an actor needs to know; small and picklable."""

    corpus: str
    settings: CodecSettings
    device: str
    spec: dict[str, Any]  # of the driver's codec: what every actor must have too

    def writer(self) -> FamilyWriter:
        return FamilyWriter(self.corpus, "latents", self.settings.name, self.spec)

    def load(self) -> Codec:
        """This node's codec. InputError where there is none, or one that would make
        other latents.
        """
        if differing := spec_differences(self.spec, codec_spec(self.settings, self.device)):
            raise InputError(
                f"{self.settings.model}: this node has other codec files than the node the job "
                "started on "
                f"({'; '.join(differing)}); give all nodes the same files"
            )
        return load_codec(self.settings, self.device)


@dataclass(frozen=True)
class EncodedUnit:
    """A published unit. decoded_here: chunks of it for which no CPU of the cluster came free."""

    codec_seconds: float
    seconds: float
    images: int
    decoded_here: int

    def __str__(self) -> str:
        rate = f"{self.images / max(self.seconds, 1e-9):.0f} images/s per actor"
        return f"{rate}, no CPU left for decoding: use fewer actors" if self.decoded_here else rate


def run_latents(
    corpus: str,
    settings: CodecSettings,
    pool: PoolSettings | None = None,
    progress: Progress = SILENT,
    cpus: int = 1,
) -> LatentsSummary:
    """Compute and publish what is missing of one latents family. Call again after any interruption.

    progress: counts units; cpus: at least so many logical CPUs for an embedded Ray that is started
    here. Raises InputError for a corpus without images, a codec that is none, is another on some
    node or whose factor does not divide the buckets, and for actors this machine has no room for;
    JobError where a source has changed, the disk is full or an actor dies too often. Finished units
    are kept.
    """
    started = time.monotonic()
    pool = pool or PoolSettings()
    opened = Corpus.open(corpus)
    device = "cuda" if pool.gpus else "cpu"
    spec = codec_spec(settings, device)
    check_buckets(opened, spec["factor"], settings.scale)
    job = LatentsJob(opened.folder.location, settings, device, spec)
    writer = FamilyWriter.open_or_create(job.corpus, "latents", settings.name, spec)
    pending = [] if writer.complete() else writer.pending()
    busy = [0.0, 0.0]
    if pending and resources.is_small(pool, len(pending)):
        progress.expect(opened.num_units, done=opened.num_units - len(pending))
        busy = _compute_here(job, pool, pending, opened.num_units, progress)
    elif pending:
        resources.connect(max(cpus, math.ceil(pool.actors * pool.cpus) + 1))
        resources.check_resources(pool)
        progress.expect(opened.num_units, done=opened.num_units - len(pending))
        busy = _compute(job, pool, pending, opened.num_units, progress)
    manifest = writer.finish({"codec": settings.model_dump(mode="json")})
    return LatentsSummary(
        settings.name,
        writer.directory,
        writer.fingerprint,
        manifest["units"],
        len(pending),
        manifest["rows"],
        manifest["bytes"],
        time.monotonic() - started,
        busy[1],
        busy[0] / busy[1] if busy[1] else 0.0,
    )


def _compute_here(
    job: LatentsJob, pool: PoolSettings, pending: list[int], total: int, progress: Progress
) -> list[float]:
    """What an actor does, in this process: the same code, so the same bytes."""
    import torch

    corpus, writer, busy = Corpus.open(job.corpus), job.writer(), [0.0, 0.0]
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, int(pool.cpus)))  # as many as an actor has
    try:
        encoder = LatentEncoder(job.load(), job.device)
        for done, unit in enumerate(pending, total - len(pending) + 1):
            chunks = unit_chunks(corpus, unit, job.settings.scale)
            pixels = (_decode(job, unit, *chunk) for chunk in chunks)
            encoded = _publish(encoder, writer, unit, pixels)
            busy = [busy[0] + encoded.codec_seconds, busy[1] + encoded.seconds]
            progress.update(done, str(encoded))
    finally:
        torch.set_num_threads(threads)
    return busy


def _compute(
    job: LatentsJob, pool: PoolSettings, pending: list[int], total: int, progress: Progress
) -> list[float]:
    """Give every actor a unit and the one after it; returns codec seconds and wall seconds over all
    units.
    """
    import ray

    lives = {"max_restarts": ACTOR_RESTARTS, "max_task_retries": TASK_RETRIES}
    actor_type = ray.remote(**resources.demands(pool), **lives)(LatentsActor)
    actors = [actor_type.remote(job) for _ in range(min(pool.actors, len(pending)))]
    remaining = iter(pending)
    queued = {actor: next(remaining, None) for actor in actors}
    running: dict[Any, Any] = {}
    done, busy = total - len(pending), [0.0, 0.0]

    def start(actor: Any) -> None:
        unit = queued[actor]
        if unit is not None:
            queued[actor] = next(remaining, None)
            running[actor.encode.remote(unit, queued[actor])] = actor

    for actor in actors:
        start(actor)
    died = f"an actor of the codec died {ACTOR_RESTARTS + 1} times; finished units are kept"
    try:
        while running:
            (finished,), _ = ray.wait(list(running))
            actor = running.pop(finished)
            with resources.plain_errors(died):
                unit: EncodedUnit = ray.get(finished)
            done, busy = done + 1, [busy[0] + unit.codec_seconds, busy[1] + unit.seconds]
            progress.update(done, str(unit))
            start(actor)
    finally:
        for actor in actors:
            ray.kill(actor)
    return busy


def _decode(job: LatentsJob, unit: int, start: int, stop: int) -> Pixels:
    corpus = Corpus.open(job.corpus)
    max_pixels = int(corpus.facts["settings"]["max_pixels"])
    return bucket_images(corpus, unit, start, stop, job.settings.scale, max_pixels)


def _publish(
    encoder: LatentEncoder, writer: FamilyWriter, unit: int, pixels: Iterator[Pixels]
) -> EncodedUnit:
    """Encode the unit's chunks as they are decoded, and publish them."""
    started, statistics = time.monotonic(), UnitStatistics()
    encoder.codec_seconds = 0.0
    record = writer.publish(unit, encoder.tables(pixels, statistics), statistics=statistics)
    seconds = time.monotonic() - started
    return EncodedUnit(encoder.codec_seconds, seconds, record.rows, decoded_here=0)


class LatentsActor:
    """Holds the codec; encodes and publishes whole units."""

    def __init__(self, job: LatentsJob) -> None:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        self.job = job
        self.problem: InputError | JobError | None = None
        try:
            self.writer, self.corpus = job.writer(), Corpus.open(job.corpus)
            self.encoder = LatentEncoder(job.load(), job.device)
        except (InputError, JobError) as error:  # Ray would only report that the actor died
            self.problem = error
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self.decode = ray.remote(num_cpus=1, max_retries=2)(_decode)
        self.decode_here = ray.remote(num_cpus=0, max_retries=2, scheduling_strategy=here)(_decode)
        self.ahead: dict[tuple[int, int, int], Any] = {}
        self.patience = DECODE_PATIENCE
        self.decoded_here = 0

    def encode(self, unit: int, following: int | None) -> EncodedUnit:
        """Publish one unit. Raises what kept the actor from starting, too."""
        if self.problem:
            raise self.problem
        self.decoded_here = 0
        encoded = _publish(self.encoder, self.writer, unit, self._pixels(unit, following))
        return replace(encoded, decoded_here=self.decoded_here)

    def _pixels(self, unit: int, following: int | None) -> Iterator[Pixels]:
        """The unit's chunks decoded, while tasks decode the next chunks, also of the unit that
        follows.
        """
        mine = self._chunks(unit)
        order = mine + (self._chunks(following) if following is not None else [])
        for position in range(len(mine)):
            for chunk in order[position : position + WINDOW]:
                if chunk not in self.ahead:
                    self.ahead[chunk] = self.decode.remote(self.job, *chunk)
            yield self._decoded(order[position])

    def _chunks(self, unit: int) -> list[tuple[int, int, int]]:
        return [
            (unit, start, stop)
            for start, stop in unit_chunks(self.corpus, unit, self.job.settings.scale)
        ]

    def _decoded(self, chunk: tuple[int, int, int]) -> Pixels:
        """The chunk's pixels and crops, from its task or from a task beside this actor, whichever
        ends first.

        After a task beside this actor has won, the next chunk is decoded beside it at once.
        """
        import ray

        task = self.ahead.pop(chunk)
        ready, _ = ray.wait([task], timeout=self.patience)
        self.patience = DECODE_PATIENCE
        if not ready:
            beside = self.decode_here.remote(self.job, *chunk)
            ready, (late,) = ray.wait([task, beside])
            ray.cancel(late)
            if ready == [beside]:
                self.patience = 0.0
                self.decoded_here += 1
        pixels: Pixels
        (pixels,) = ray.get(ready)
        return pixels
