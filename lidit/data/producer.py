"""The producer of a rolling family: a loop that starts units, deletes others, and says how it is
going.

Needs no cluster: encoders are behind `EncoderPool`, in actors or in this very process. The loop
keeps no state that
counts: what is on disk and what readers say is looked at anew, so it may be killed at any point and
started again.
"""

from __future__ import annotations

import logging
import math
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

from lidit.config import DataSettings, OnlineSettings
from lidit.data.credit import Credit, read_credits
from lidit.data.demand import Demand, kept_units, validation_units
from lidit.data.production import (
    Needs,
    Reader,
    beyond_budget,
    needs,
    plan_step,
    windows_ready,
)
from lidit.data.rows import Rows
from lidit.errors import InputError, JobError, StorageError, one_line
from lidit.store import Corpus, FamilyWriter
from lidit.store.files.atomic import publish_bytes, remove_leftovers
from lidit.store.janitor import delete_unit, first_record
from lidit.store.rolling import DELETED, PRODUCER_FILE
from lidit.store.schema import seal

log = logging.getLogger(__name__)
LOOK_SECONDS = 0.5
TELL_SECONDS = 5.0
FULL_SECONDS = 10.0  # between two tries on a full disk


@dataclass(frozen=True)
class Finished:
    """A unit that a pool is done with. device: what computed it; facts: the pool's own, for its
    metrics.

    outcome: "lost" where the encoder died, "disk full" where it did not fit; both are tried again,
    "failed" is not.
    """

    unit: int
    outcome: Literal["published", "lost", "disk full", "failed"] = "published"
    error: InputError | JobError | None = None
    device: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)


class EncoderPool(Protocol):
    """Encoders that compute and publish one unit each, at once or later."""

    @property
    def actors(self) -> int: ...

    @property
    def slots(self) -> int:
        """Units that may start now."""
        ...

    def start(self, unit: int) -> None: ...

    def finished(self, seconds: float) -> list[Finished]:
        """What was done since the last call; waits for so long where nothing was."""
        ...

    def resize(self, actors: int) -> None: ...


@dataclass(frozen=True)
class State:
    """How a production stands. ahead: whole windows on disk beyond the slowest reader's; -1: its
    own is not complete.

    wanted_actors: how many would keep the readers supplied; 0 before that is known.
    """

    family: str
    on_disk: int
    in_flight: int
    ahead: int
    actors: int
    wanted_actors: int
    computed: int
    met: int
    readers: tuple[str, ...]


@dataclass(frozen=True)
class Work:
    """One family to produce. expected: the credit of the run it is for, until that says so itself.

    ends: whether production is over when every reader is finished, not only when it is stopped.
    """

    writer: FamilyWriter
    online: OnlineSettings
    expected: Credit
    ends: bool = True


class Producer:
    """Produces one family until all its readers are finished or `stop` is set. Call `run` once.

    told: called with the state now and then. finished: called with every unit that was computed.
    """

    def __init__(
        self,
        work: Work,
        pool: EncoderPool,
        told: Callable[[State], None] = lambda state: None,
        finished: Callable[[Finished], None] = lambda unit: None,
    ) -> None:
        self.work, self.pool, self.told, self.on_finished = work, pool, told, finished
        self.writer, self.online = work.writer, work.online
        self.folder, self.corpus = work.writer.folder, work.writer.corpus
        self.kept = kept_units(self.writer.fingerprint, self.corpus.num_units, self.online.keep)
        remove_leftovers(self.folder.child(DELETED))  # of a producer that was killed
        self.present = set(range(self.corpus.num_units)) - set(self.writer.pending())
        self.in_flight: set[int] = set()
        self.speed = _Speed()
        self.computed = self.met = 0
        self._demands: dict[Credit, Demand] = {}
        # reader -> its last beat, and when it was new here
        self._heard: dict[str, tuple[int, float]] = {}
        self._silent: set[str] = set()
        self._needs: tuple[object, Needs] | None = None
        self._devices: set[str] = set()
        self._told_at, self._full_until, self._seen_met = -math.inf, -math.inf, set[int]()

    def run(self, stop: threading.Event) -> State:
        """Returns the last state. Raises InputError or JobError for what no other
        try would mend.
        """
        self._tell(Needs([], [], frozenset()), [], force=True)
        try:
            while True:
                # Asked before the readers are: their last word is heard, and what they leave is
                # deleted.
                stopping = stop.is_set()
                readers, living = self._readers()
                wants = self._wants(readers)
                done = stopping or (
                    self.work.ends and all(reader.credit.finished for reader in readers)
                )
                self._act(wants, living, starting=not done)
                self._tell(wants, readers)
                if done and not self.in_flight:
                    return self._tell(wants, readers, force=True)
                for unit in self.pool.finished(LOOK_SECONDS):
                    self._take(unit)
        except Exception as error:
            self._publish({"failed": one_line(error, 500)})
            raise

    # -- readers -----------------------------------------------------------------------------------

    def _readers(self) -> tuple[list[Reader], bool]:
        """Everybody whose credit counts, and whether one of them was heard of: before that nothing
        is deleted.
        """
        now, credits = time.monotonic(), read_credits(self.folder)
        counted, living = [], False
        expected = self.work.expected
        for name, credit in credits.items():
            if name == expected.run:  # its recipe may have been given more steps since it spoke
                credit = replace(credit, steps=expected.steps)
            beat, since = self._heard.get(name, (-1, now))
            if credit.beat != beat:
                since = now
                if name in self._silent:
                    log.warning("%s: reader %s is heard of again", self.folder.location, name)
                    self._silent.discard(name)
            self._heard[name] = (credit.beat, since)
            heard = now - since <= self.online.patience
            if not heard and not credit.finished and name not in self._silent:
                self._silent.add(name)
                log.warning(
                    "%s: reader %s was silent for %g s (online.patience) and is dropped at step "
                    "%d: its units are "
                    "deleted as others go on, and computed anew when it comes back",
                    self.folder.location, name, self.online.patience, credit.step,
                )  # fmt: skip
            living = living or heard
            if heard or name == expected.run:
                counted.append(self._reader(credit))
        if expected.run not in credits:
            counted.append(self._reader(expected))
        return counted, living

    def _reader(self, credit: Credit) -> Reader:
        # A demand is of an order and its end; what changes from beat to beat is not part of it.
        key = replace(credit, step=0, checkpoint=0, step_seconds=0.0, beat=0)
        if key not in self._demands:
            self._demands[key] = demand_of(self.corpus, credit)
        return Reader(credit, self._demands[key])

    def _wants(self, readers: list[Reader]) -> Needs:
        """The needs, worked out only where a reader has moved."""
        place = [(r.demand, r.window, r.credit.step >= r.credit.steps, r.credit.finished,
                  r.demand.window(r.credit.checkpoint)) for r in readers]  # fmt: skip
        if self._needs is None or self._needs[0] != place:
            self._needs = (place, needs(readers, self.online.ahead))
            # A unit that is there when its window comes into sight need not be computed: what
            # `keep` is for.
            sight = {unit for units in self._needs[1].wanted[-1:] for unit in units}
            self.met += len((sight - self._seen_met) & self.present)
            self._seen_met = sight
        return self._needs[1]

    # -- units -------------------------------------------------------------------------------------

    def _act(self, wants: Needs, living: bool, starting: bool) -> None:
        full = time.monotonic() < self._full_until
        # A full disk holds what it holds: only what is deleted makes room for another unit.
        lasting = self.kept | wants.pinned
        budget = len((self.present | self.in_flight) - lasting) if full else self.online.budget
        slots = self.pool.slots if starting else 0
        step = plan_step(wants, self.present, self.in_flight, slots, self.kept, budget)
        if living:
            for unit in step.remove:
                delete_unit(self.writer, unit)
                self.present.discard(unit)
        elif step.remove and self.online.budget is not None:
            # no reader has been heard of: nothing is deleted, so nothing that needs the room may
            # start
            return
        if step.stuck and not full:
            raise InputError(f"{self.folder.location}: {step.stuck}")
        for unit in step.start:
            self.in_flight.add(unit)
            self.pool.start(unit)

    def _take(self, unit: Finished) -> None:
        self.in_flight.discard(unit.unit)
        if unit.outcome == "lost":
            return
        if unit.outcome == "disk full":
            if time.monotonic() >= self._full_until:
                log.warning("%s: the disk is full; production waits for room", self.folder.location)
            self._full_until = time.monotonic() + FULL_SECONDS
            return
        if unit.error is not None:
            raise unit.error
        self.present.add(unit.unit)
        self.computed += 1
        self.speed.done()
        self._compare(unit)
        self.on_finished(unit)

    def _compare(self, unit: Finished) -> None:
        """Say it where a unit's bytes are not those of its first computation, or where devices
        differ.
        """
        self._devices.add(unit.device)
        if len(self._devices) > 1:
            devices = " and ".join(sorted(self._devices))
            if self.online.exact:
                raise InputError(
                    f"{self.folder.location}: computed on {devices}, whose states differ in "
                    "their last bits; keep to "
                    "one kind of device, or set online.exact=false"
                )
        first, record = first_record(self.writer, unit.unit), self.writer.committed(unit.unit)
        if first and record and first.sha256 != record.sha256:
            log.warning(
                "%s: unit %d has other bytes than when it was first computed (sha256 %s, then %s): "
                    "another device or "
                "library rounds otherwise",
                self.folder.location, unit.unit, first.sha256[:12], record.sha256[:12],
            )  # fmt: skip

    # -- what is said ------------------------------------------------------------------------------

    def _tell(self, wants: Needs, readers: list[Reader], force: bool = False) -> State:
        self.speed.busy(min(len(self.in_flight), self.pool.actors))
        due = force or time.monotonic() - self._told_at >= TELL_SECONDS
        wanted = self._wanted_actors(readers)
        if due and self.online.max_actors and wanted:
            self.pool.resize(min(self.online.max_actors, wanted))
        ahead = windows_ready(wants, self.present) if wants.wanted else 0
        state = State(
            family=self.writer.directory,
            on_disk=len(self.present),
            in_flight=len(self.in_flight),
            ahead=ahead,
            actors=self.pool.actors,
            wanted_actors=wanted,
            computed=self.computed,
            met=self.met,
            readers=tuple(reader.credit.run for reader in readers),
        )
        if due:
            self._told_at = time.monotonic()
            self._publish(
                {
                    "ahead": ahead,
                    "wanted_actors": wanted,
                    "actors": state.actors,
                    "computed": state.computed,
                }
            )
            self.told(state)
        return state

    def _wanted_actors(self, readers: list[Reader]) -> int:
        """Actors that compute units as fast as readers use them up when they do not wait."""
        rate = 0.0
        units = self.corpus.num_units
        per_unit = self.corpus.num_samples / units
        for reader in readers:
            if reader.credit.step_seconds and not reader.credit.finished:
                rate += reader.credit.batch_size / reader.credit.step_seconds / per_unit
        return math.ceil(rate * (1 - self.online.keep) * self.speed.seconds_per_unit)

    def _publish(self, facts: dict[str, Any]) -> None:
        who = {
            "process": os.getpid(),
            "host": socket.gethostname(),
            "written": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
        }
        try:
            publish_bytes(self.folder, PRODUCER_FILE, seal({**who, **facts}))
        except (OSError, JobError, StorageError) as error:
            # a full disk holds up what is said, not what is done
            log.debug("%s: %s", self.folder.location, one_line(error, 200))


def check_budget(writer: FamilyWriter, online: OnlineSettings, credit: Credit) -> None:
    """Raise InputError where the first window alone takes more units than the budget allows."""
    wants = needs([Reader(credit, demand_of(writer.corpus, credit))], online.ahead)
    kept = kept_units(writer.fingerprint, writer.corpus.num_units, online.keep)
    if problem := beyond_budget(wants, kept, online.budget):
        raise InputError(f"{writer.folder.location}: {problem}")


def demand_of(corpus: Corpus, credit: Credit) -> Demand:
    """What a reader of this credit needs of a corpus."""
    settings = DataSettings(
        seed=credit.seed,
        window_units=credit.window_units,
        validation_fraction=credit.validation_fraction,
    )
    rows, held_out = Rows(corpus, settings), Rows(corpus, settings, "validation")
    pinned = frozenset[int]()
    if credit.validation_batches:
        pinned = validation_units(held_out.order(credit.batch_size), credit.validation_batches)
    return Demand(rows.order(credit.batch_size), credit.steps, pinned)


class _Speed:
    """Seconds that one encoder needs for a unit, measured while it has work."""

    def __init__(self) -> None:
        self._busy, self._units, self._since = 0.0, 0, time.monotonic()

    def busy(self, encoders: int) -> None:
        now = time.monotonic()
        self._busy += encoders * (now - self._since)
        self._since = now

    def done(self) -> None:
        self._units += 1

    @property
    def seconds_per_unit(self) -> float:
        return self._busy / self._units if self._units else 0.0
