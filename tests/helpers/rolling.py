"""A rolling family without a model or a cluster: real files, whose states depend on the captions
alone.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa

from lidit.config import DataSettings, OnlineSettings
from lidit.data.credit import Credit
from lidit.data.producer import Finished, Producer, State, Work
from lidit.store import Corpus, ImageReference, Sample, publish_corpus, publish_unit, unit_tables
from lidit.store.files.folder import Folder
from lidit.store.janitor import announce_rolling
from lidit.store.rolling import RollingTextFamily
from lidit.store.writer import FamilyWriter
from tests.helpers import family_job

STORAGE = "int8"


def make_pictured_corpus(path: Path, units: int, rows: int, buckets: int = 1) -> Corpus:
    """Units of `rows` samples with a caption each; with several buckets every tenth sample is of a
    rarer one.
    """
    folder, made = Folder.at(path), []
    for unit in range(units):
        samples = []
        for row in range(rows):
            number = unit * rows + row
            bucket = 1 + number // 10 % (buckets - 1) if buckets > 1 and number % 10 == 0 else 0
            image = ImageReference("pictures.tar", f"{number}.png")
            captions = ((f"c{number}", "original"),)
            samples.append(Sample(f"{number}", captions, image, 32, 32, f"{32 + bucket}x32"))
        made.append(publish_unit(folder, unit, 5, f"{unit}.tar", *unit_tables(samples)))
    sources = pa.table({"file": [f"{unit}.tar" for unit in range(units)]})
    return publish_corpus(folder, made, 5, "/nowhere", sources, {}, {"refused": 0})


def announced(corpus: Path, patience: float = 30.0) -> FamilyWriter:
    """The writer of a rolling family that readers may open."""
    writer = family_job.open_writer(str(corpus), STORAGE)
    writer.write_shared(family_job.shared())  # type: ignore[arg-type]
    announce_rolling(writer, patience, {})
    return writer


def opened(corpus: Path) -> RollingTextFamily:
    family = Corpus.open(corpus).text_family("fake", rolling=True)
    assert isinstance(family, RollingTextFamily)
    return family


def credit(
    settings: DataSettings, batch_size: int, steps: int, run: str = "run", **changes: object
) -> Credit:
    return Credit(
        run=run,
        seed=settings.seed,
        window_units=settings.window_units,
        batch_size=batch_size,
        validation_fraction=settings.validation_fraction,
        validation_batches=0,
        steps=steps,
        **changes,  # type: ignore[arg-type]
    )


class HerePool:
    """Computes units in this process, as they are started; tells of them later, `delay` looks after
    their start.

    seen: called before each unit with what is on disk and in flight, for tests that count.
    """

    def __init__(
        self, writer: FamilyWriter, actors: int = 2, seen: Callable[[], None] = lambda: None
    ) -> None:
        self.writer, self.actors, self.seen = writer, actors, seen
        self.waiting: list[int] = []
        self.computed: list[int] = []

    @property
    def slots(self) -> int:
        return 2 * self.actors - len(self.waiting)

    def start(self, unit: int) -> None:
        self.waiting.append(unit)
        self.seen()

    def finished(self, seconds: float) -> list[Finished]:
        if not self.waiting:
            threading.Event().wait(min(seconds, 0.005))  # nothing to do until a reader moves
            return []
        unit = self.waiting.pop(0)
        family_job.publish(self.writer, unit)
        self.computed.append(unit)
        self.seen()
        return [Finished(unit, device="here")]

    def resize(self, actors: int) -> None:
        self.actors = actors


class Producing:
    """A producer in a thread, as a context: stopped at the end, its failure raised."""

    def __init__(
        self, writer: FamilyWriter, online: OnlineSettings, expected: Credit, pool: HerePool
    ) -> None:
        self.stop, self.states = threading.Event(), list[State]()
        self.producer = Producer(Work(writer, online, expected), pool, self.states.append)
        self.failure: BaseException | None = None
        self.last: State | None = None
        self.thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        try:
            self.last = self.producer.run(self.stop)
        except BaseException as error:
            self.failure = error

    def __enter__(self) -> Producing:
        self.thread.start()
        return self

    def wait(self) -> None:
        """Until it ends by itself: every reader is finished."""
        self.thread.join(60)
        assert not self.thread.is_alive()
        if self.failure:
            raise self.failure

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self.thread.join(60)
        assert not self.thread.is_alive()


def units_on_disk(writer: FamilyWriter) -> set[int]:
    """Units whose record stands."""
    return {
        int(name.removesuffix(".json"))
        for name in writer.folder.sizes()
        if name[:5].isdigit() and ".json" in name
    }


def data_files(writer: FamilyWriter) -> list[str]:
    return sorted(
        name for name in writer.folder.sizes() if name[:5].isdigit() and name.endswith(".arrow")
    )
