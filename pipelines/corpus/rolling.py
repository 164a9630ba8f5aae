"""Rolling families on a cluster: encoder actors that compute what training needs next, until it is
finished.

The loop, its rules and its files are `lidit.data.producer`'s; here are the actors behind it, the
same as those that `lidit embed` has, and the threads of several encoders side by side.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import torch

from lidit.config import EncoderSettings, OnlineSettings, PoolSettings
from lidit.data.credit import Credit
from lidit.data.producer import Finished, Producer, State, Work, check_budget
from lidit.errors import InputError, JobError, one_line
from lidit.store import Corpus
from lidit.store.files.owner import owned
from lidit.store.janitor import announce_rolling
from lidit.text import resolve_encoder
from lidit.text.embedding import check_tokenizer
from pipelines.corpus.embed import ACTOR_RESTARTS, CALLS_PER_ACTOR, TASK_RETRIES
from pipelines.corpus.encode_units import (
    EncodeJob,
    EncodeUnits,
    device_of,
    open_writer,
    prepare,
    provenance,
    raise_problem,
    tell_code,
    tokenize_units,
)
from pipelines.runtime import resources
from pipelines.runtime.prometheus import EmbedMetrics

log = logging.getLogger(__name__)
STANDBY_SECONDS = 5.0
Told = Callable[[State], None]
FULL = tuple(os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG))


@dataclass(frozen=True)
class RollingRun:
    """What families are produced for: settings and a run's credit. ends: see `Work`."""

    online: OnlineSettings
    expected: Credit
    ends: bool = True


@dataclass(frozen=True)
class RollingSummary:
    """What a producer did. met: units that were there already when their window came into sight."""

    directory: str
    computed: int
    met: int
    on_disk: int


def announce(
    corpus: str,
    settings: EncoderSettings,
    pool: PoolSettings,
    run: RollingRun,
    cpus: int = 2,
) -> EncodeJob | None:
    """Make a rolling family ready for readers: its spec, its shared states, ROLLING.json. Call
    again at every start.

    cpus: logical CPUs of an embedded Ray, which is started where shared states are missing. None
    where the family is complete: training reads it as it is. Raises InputError for a budget with
    which the run could not begin.
    """
    opened = Corpus.open(corpus)
    corpus, spec = opened.folder.location, resolve_encoder(settings, device_of(pool))
    check_tokenizer(opened, spec)
    job = EncodeJob(corpus, settings, spec, pool)
    writer = open_writer(corpus, spec)
    if writer.complete():
        return None
    check_budget(writer, run.online, run.expected)
    if writer.shared() is None:
        import ray

        resources.connect(cpus)
        resources.check_resources(pool)
        with resources.plain_errors(f"the process that prepares {spec.name} died"):
            raise_problem(ray.get(ray.remote(**resources.demands(pool))(prepare).remote(job)))
        tell_code(job)
    announce_rolling(job.writer(), run.online.patience, provenance(settings, spec))
    return job


def most_actors(pool: PoolSettings, online: OnlineSettings) -> PoolSettings:
    """A pool with as many actors as it may come to have."""
    return pool.model_copy(update={"actors": max(pool.actors, online.max_actors or 0)})


def produce(job: EncodeJob, run: RollingRun, stop: threading.Event, told: Told) -> State | None:
    """Produce one family until its readers are finished or `stop` is set; None where stopped before
    it had to.

    Where another process produces the family, this one stands by and takes over when that one ends.
    """
    writer, metrics = job.writer(), EmbedMetrics(job.spec.name)
    counts = writer.corpus.units["captions"].to_pylist()

    def tell(state: State) -> None:
        metrics.rolling(state.ahead, state.wanted_actors, state.on_disk)
        if problem := too_slow(state):
            log.warning(problem)
        told(state)

    def count(unit: Finished) -> None:
        metrics.unit_done(captions=counts[unit.unit], left=0, **unit.facts)

    with ExitStack() as stack:
        if not _take_over(stack, job, stop):
            return None
        pool = ActorPool(job)
        stack.callback(pool.close)
        return Producer(Work(writer, run.online, run.expected, run.ends), pool, tell, count).run(
            stop
        )


def too_slow(state: State) -> str:
    """What to say where training waits because its encoders are too few; "" where it does not."""
    if state.ahead >= 0 or state.wanted_actors <= state.actors:
        return ""
    return (
        f"{state.family}: training waits for states: {state.actors} encoder actors are too few, "
        f"{state.wanted_actors} would do"
    )


def _take_over(stack: ExitStack, job: EncodeJob, stop: threading.Event) -> bool:
    """Own the family for as long as `stack` lives; False where `stop` came first."""
    folder, told = job.writer().folder, False
    while True:
        try:
            stack.enter_context(owned(folder, "computed as it is read"))
            return True
        except InputError as refusal:
            if not told:
                log.info("standing by: %s", refusal)
            told = True
        if stop.wait(STANDBY_SECONDS):
            return False


class _Threads:
    """One thread per family that is produced. A failure stops the others once they are waited for:
    until then they go on, so that readers come to the unit whose producer failed and hear why.
    """

    def __init__(self, jobs: Sequence[EncodeJob], run: RollingRun, told: Told) -> None:
        self.stop, self.summaries = threading.Event(), list[RollingSummary]()
        self.failure: BaseException | None = None

        def work(job: EncodeJob) -> None:
            try:
                state = produce(job, run, self.stop, told)
                if state is not None:
                    directory = job.writer().directory
                    self.summaries.append(
                        RollingSummary(directory, state.computed, state.met, state.on_disk)
                    )
            except BaseException as error:
                self.failure = self.failure or error

        # Daemons: Ctrl-C must end the process although a thread waits for an actor.
        self.threads = [
            threading.Thread(target=work, args=(job,), name=job.spec.name, daemon=True)
            for job in jobs
        ]
        for thread in self.threads:
            thread.start()

    def wait(self) -> None:
        """Until all have ended; raises the first failure."""
        for thread in self.threads:
            while thread.is_alive():
                thread.join(1.0)  # in pieces, so that Ctrl-C is heard
                if self.failure is not None:
                    self.stop.set()
        if self.failure is not None:
            raise self.failure


@contextmanager
def producing(jobs: Sequence[EncodeJob], run: RollingRun) -> Iterator[list[RollingSummary]]:
    """Produce families in threads of this process while the block runs; the summaries are there
    after it.

    A producer's failure reaches waiting readers through the family's folder, and is what this
    raises in place of theirs.
    """
    threads = _Threads(jobs, run, lambda state: None)
    try:
        yield threads.summaries
    except (InputError, JobError):
        if threads.failure is not None:
            raise threads.failure from None
        raise
    finally:
        threads.stop.set()
    threads.wait()


def run_rolling(jobs: Sequence[EncodeJob], run: RollingRun, told: Told) -> list[RollingSummary]:
    """Produce families until all their readers are finished. Raises what a producer raises."""
    threads = _Threads(jobs, run, told)
    threads.wait()
    return threads.summaries


# -- actors ----------------------------------------------------------------------------------------


class RollingEncoder(EncodeUnits):
    """An encoder actor that also says what it computes on."""

    def encode(self, batch: pa.Table) -> tuple[list[dict[str, Any]], str]:
        rows: list[dict[str, Any]] = self(batch).to_pylist()
        return rows, self.kind_of_device()

    def kind_of_device(self) -> str:
        if self.job.pool.gpus and torch.cuda.is_available():
            return str(torch.cuda.get_device_name())
        return f"CPU with {torch.backends.cpu.get_cpu_capability()}"


class ActorPool:
    """Encoder actors, two units each: one is packed and written while the next one computes.

    An actor gets units once it has started: one for which the cluster has no room yet holds none.
    """

    def __init__(self, job: EncodeJob) -> None:
        import ray

        self.job, self.ray = job, ray
        # of a unit's result -> the unit and its actor's number
        self._calls: dict[Any, tuple[int, int]] = {}
        self._actors: dict[int, Any] = {}
        # of the first answer of an actor that has not given it yet -> its number
        self._starting: dict[Any, int] = {}
        self._made = self._deaths = 0
        self._tokenize = ray.remote(num_cpus=0, max_retries=TASK_RETRIES)(tokenize_units)
        self.resize(job.pool.actors)

    @property
    def actors(self) -> int:
        """Those that have started."""
        return len(self._started())

    @property
    def slots(self) -> int:
        return CALLS_PER_ACTOR * self.actors - len(self._calls)

    def resize(self, actors: int) -> None:
        """More at once, fewer as they have nothing to do; first those that have not started."""
        while len(self._actors) < actors:
            options = resources.demands(self.job.pool)
            made = self.ray.remote(**options)(RollingEncoder).options(
                max_concurrency=CALLS_PER_ACTOR,
                max_restarts=ACTOR_RESTARTS,
                max_task_retries=TASK_RETRIES,
            )
            actor = self._actors[self._made] = made.remote(self.job)
            self._starting[actor.kind_of_device.remote()] = self._made
            self._made += 1
        waiting = set(self._starting.values())
        idle = sorted(
            (n for n in self._actors if not self._load(n)), key=lambda n: n not in waiting
        )
        for number in idle[: max(0, len(self._actors) - actors)]:
            self._forget(number)

    def start(self, unit: int) -> None:
        number = min(self._started(), key=self._load)
        tokens = self._tokenize.remote(pa.table({"unit": pa.array([unit], pa.int32())}), self.job)
        self._calls[self._actors[number].encode.remote(tokens)] = (unit, number)

    def finished(self, seconds: float) -> list[Finished]:
        expected = [*self._calls, *self._starting]
        if not expected:
            time.sleep(seconds)  # nothing is under way: the caller's own limit
            return []
        self.ray.wait(expected, timeout=seconds)
        ready, _ = self.ray.wait(expected, num_returns=len(expected), timeout=0)
        for ref in ready:
            if ref in self._starting:
                self._welcome(ref)
        return [self._result(ref, *self._calls.pop(ref)) for ref in ready if ref in self._calls]

    def close(self) -> None:
        for actor in self._actors.values():
            self.ray.kill(actor)

    def _load(self, number: int) -> int:
        return sum(holder == number for _, holder in self._calls.values())

    def _started(self) -> list[int]:
        waiting = set(self._starting.values())
        return [number for number in self._actors if number not in waiting]

    def _welcome(self, ref: Any) -> None:
        """What an actor's first answer says: it has started, or it is dead for good."""
        number = self._starting.pop(ref)
        try:
            self.ray.get(ref)
        except self.ray.exceptions.RayActorError as error:
            self._replace(number, error)

    def _forget(self, number: int) -> None:
        self.ray.kill(self._actors.pop(number))
        self._starting = {ref: other for ref, other in self._starting.items() if other != number}

    def _result(self, ref: Any, unit: int, number: int) -> Finished:
        try:
            rows, device = self.ray.get(ref)
        except self.ray.exceptions.RayActorError as error:
            self._replace(number, error)
            return Finished(unit, "lost")
        except self.ray.exceptions.RayError as error:
            raise JobError(
                f"{self.job.spec.name}: a unit could not be computed: {one_line(error)[-400:]}"
            ) from error
        self._deaths = 0
        row = rows[0]
        if problem := row["problem"]:
            full = any(text in problem["text"] for text in FULL)
            reason = (InputError if problem["input"] else JobError)(problem["text"])
            return Finished(unit, "disk full" if full else "failed", reason)
        facts = {
            "tokens": row["tokens"],
            "padded_tokens": row["computed_tokens"],
            "seconds": row["seconds"],
        }
        return Finished(unit, device=device, facts=facts)

    def _replace(self, number: int, error: Exception) -> None:
        """A new actor for one that is dead for good; an error where no actor finishes a unit any
        more.
        """
        if number not in self._actors:
            return  # replaced by the other of its two calls
        self._forget(number)
        self._deaths += 1
        if self._deaths > ACTOR_RESTARTS:
            reason = one_line(error)[-400:]
            raise JobError(
                f"{self.job.spec.name}: encoders die again and again: {reason}"
            ) from error
        self.resize(len(self._actors) + 1)
