"""The credit of a reader: one small sealed file that says how far a training has come.

It is all that a producer knows of a training: its order, its step, its newest complete checkpoint.
A training that has died gives no more credit, and so stops its producers; they are never more than
`ahead` windows before it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace

from lidit.config import Recipe
from lidit.data.rows import Rows
from lidit.errors import InputError, JobError, StorageError, one_line
from lidit.store import Corpus
from lidit.store.files.atomic import publish_bytes, remove_leftovers
from lidit.store.files.folder import Folder
from lidit.store.rolling import READERS
from lidit.store.schema import digest_of, seal, unseal

log = logging.getLogger(__name__)
BEATS_PER_PATIENCE = 20  # a reader is silent when it has missed that many


@dataclass(frozen=True)
class Credit:
    """run: the reader's name. seed to validation_batches: what its order follows from. step: steps
    that all workers have taken; checkpoint: the step a restart would go on from; step_seconds: of a
    step, waiting apart, 0 where unknown; beat: rises while the reader lives.
    """

    run: str
    seed: int
    window_units: int
    batch_size: int
    validation_fraction: float
    validation_batches: int
    steps: int
    step: int = 0
    checkpoint: int = 0
    step_seconds: float = 0.0
    beat: int = 0

    @property
    def order_key(self) -> str:
        """The same for readers whose batches are the same."""
        return digest_of([self.seed, self.window_units, self.batch_size, self.validation_fraction])

    @property
    def finished(self) -> bool:
        """Whether nothing is read any more: the checkpoint of the last step is complete."""
        return self.checkpoint >= self.steps


def credit_of(recipe: Recipe, corpus: Corpus) -> Credit:
    """The credit of a recipe's run before its first step."""
    data, train, folder = recipe.data, recipe.train, recipe.run_folder.resolve()
    batches = 0
    if train.validate_every:
        available = Rows(corpus, data, "validation").order(train.batch_size).batches_before(1)
        batches = min(max(1, train.validation_samples // train.batch_size), available)
    return Credit(
        # Runs of one name may stand in several folders.
        run=f"{recipe.name}-{digest_of(str(folder))[:8]}",
        seed=data.seed,
        window_units=data.window_units,
        batch_size=train.batch_size,
        validation_fraction=data.validation_fraction,
        validation_batches=batches,
        steps=train.steps,
    )


def read_credits(family: Folder) -> dict[str, Credit]:
    """The credits of a family's readers, by name; a torn or foreign file is none."""
    folder, found = family.child(READERS), {}
    for name in folder.sizes():
        if not name.endswith(".json"):
            continue
        try:
            credit = Credit(**unseal(folder.read_bytes(name)))
        except (FileNotFoundError, ValueError, TypeError):
            continue
        found[credit.run] = credit
    return found


def publish_credit(family: Folder, credit: Credit) -> None:
    """Write a reader's file."""
    folder = family.child(READERS)
    folder.create()
    publish_bytes(folder, f"{credit.run}.json", seal(asdict(credit)))


def forget_credit(family: Folder, credit: Credit) -> None:
    """Remove a reader's file: its run was deleted and begins anew."""
    family.child(READERS).remove(f"{credit.run}.json")


class CreditKeeper:
    """Publishes a reader's credit from a thread of its own: no step waits for a disk.

    families: folders of the rolling families that it reads. window_of: the window of a step. Close
    it at the end.
    """

    def __init__(
        self,
        families: Sequence[Folder],
        credit: Credit,
        window_of: Callable[[int], int],
        patience: float,
    ) -> None:
        self.families, self.window_of, self.every = (
            families,
            window_of,
            patience / BEATS_PER_PATIENCE,
        )
        # Another beat than an earlier start's, whose file may lie there still.
        self.credit = replace(credit, beat=time.time_ns())
        self._lock, self._woken, self._closed = threading.Lock(), threading.Event(), False
        self._window = self._window_of(credit.step)
        for family in families:  # a start that was killed as it wrote left half a file
            remove_leftovers(family.child(READERS))
        self._publish()  # before the first read: what an earlier start said may lie far ahead
        self._thread = threading.Thread(target=self._run, name="credit", daemon=True)
        self._thread.start()

    def advance(self, step: int, step_seconds: float) -> None:
        """All workers have taken `step` steps; a step computes for `step_seconds`."""
        mean = self.credit.step_seconds
        seconds = step_seconds if not mean else 0.9 * mean + 0.1 * step_seconds
        with self._lock:
            self.credit = replace(self.credit, step=step, step_seconds=round(seconds, 6))
        window = self._window_of(step)
        # At once, for encoders may wait for room; within a window a beat is soon enough.
        if window != self._window:
            self._window = window
            self._woken.set()

    def _window_of(self, step: int) -> int:
        return -1 if step >= self.credit.steps else self.window_of(step)

    def saved(self, step: int) -> None:
        """The checkpoint of `step` is complete on every worker."""
        with self._lock:
            self.credit = replace(self.credit, checkpoint=step)
        self._woken.set()

    def close(self) -> None:
        """Publish where the reader stands, once more, and end."""
        self._closed = True
        self._woken.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._closed:
            self._woken.wait(self.every)
            self._woken.clear()
            self._publish()
        self._publish()  # what was said while the last one was written

    def _publish(self) -> None:
        with self._lock:
            self.credit = replace(self.credit, beat=self.credit.beat + 1)
            credit = self.credit
        for family in self.families:
            try:
                publish_credit(family, credit)
            except (OSError, InputError, JobError, StorageError) as error:
                # It is tried again at the next beat; without credit the producers wait, they never
                # run away.
                log.warning(
                    "%s: the reader's file cannot be written: %s",
                    family.location,
                    one_line(error, 200),
                )
