"""Rolling families with real files and no model: readers that wait, a producer that keeps to its
budget, credits.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from lidit.config import DataSettings, OnlineSettings
from lidit.data.credit import Credit, CreditKeeper, publish_credit, read_credits
from lidit.data.demand import kept_units
from lidit.data.feed import Feed
from lidit.data.order import GlobalBatch, Order
from lidit.data.producer import Finished
from lidit.data.rows import Rows
from lidit.errors import InputError, JobError
from lidit.store import Corpus
from lidit.store.files.atomic import ROLLING_POINTS
from lidit.store.janitor import delete_unit, first_record
from lidit.store.verify import verify_corpus
from lidit.store.writer import FamilyWriter
from tests.helpers import family_job
from tests.helpers.rolling import (
    HerePool,
    Producing,
    announced,
    credit,
    data_files,
    make_pictured_corpus,
    opened,
    units_on_disk,
)
from tests.helpers.waiting import wait_until

DATA = DataSettings(window_units=2, validation_fraction=0.0)
BATCH = 6


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    make_pictured_corpus(tmp_path / "corpus", 24, 8, buckets=2)
    return tmp_path / "corpus"


def order_of(corpus: Path, data: DataSettings = DATA, batch: int = BATCH) -> Order:
    return Rows(Corpus.open(corpus), data).order(batch)


def read_all(
    corpus: Path, keeper: CreditKeeper, order: Order, steps: range
) -> Iterator[list[torch.Tensor]]:
    """What a trainer reads: every row of every batch, its credit after each."""
    family = opened(corpus)
    for step in steps:
        batch = order.batch(step)
        states = []
        for unit, row in zip(batch.unit.tolist(), batch.row.tolist(), strict=True):
            family.verify_unit(unit)
            states += family.read(unit, [row])
        yield states
        keeper.advance(step + 1, 0.001)
        if step % 5 == 4 or step == steps.stop - 1:
            keeper.saved(step + 1)


def expected_states(corpus: Path, order: Order, step: int) -> list[torch.Tensor]:
    """The same rows of a family that was computed as a whole."""
    family, batch = Corpus.open(corpus).text_family("fake"), order.batch(step)
    return [
        family.read(u, [r])[0] for u, r in zip(batch.unit.tolist(), batch.row.tolist(), strict=True)
    ]


def keeper_of(writer: FamilyWriter, order: Order, given: Credit) -> CreditKeeper:
    return CreditKeeper([writer.folder], given, order.window_of, 30.0)


def test_a_training_reads_what_a_whole_family_holds_through_a_small_budget(
    corpus: Path, tmp_path: Path
) -> None:
    make_pictured_corpus(tmp_path / "whole", 24, 8, buckets=2)
    family_job.run(str(tmp_path / "whole"), "int8")
    order, writer = order_of(corpus), announced(corpus)
    steps = order.batches_before(2)
    given = credit(DATA, BATCH, steps)
    most: list[int] = []
    pool = HerePool(writer, seen=lambda: most.append(len(data_files(writer)) + len(pool.waiting)))
    with Producing(writer, OnlineSettings(ahead=1, budget=10), given, pool) as producing:
        keeper = keeper_of(writer, order, given)
        for step, states in enumerate(read_all(corpus, keeper, order, range(steps))):
            wanted = expected_states(tmp_path / "whole", order, step)
            assert all(torch.equal(a, b) for a, b in zip(states, wanted, strict=True))
        keeper.close()
        producing.wait()
    assert max(most) <= 10
    assert len(pool.computed) >= 2 * 24 - 10
    assert units_on_disk(writer) == set(), "who has finished needs nothing"
    assert not data_files(writer)
    # The same bytes in both families, and in every computation of a unit.
    whole = Corpus.open(tmp_path / "whole").text_family("fake")
    for unit in range(24):
        first = first_record(writer, unit)
        assert first
        assert first.sha256 == whole.record(unit)["sha256"]


def test_a_kept_share_is_computed_once_and_met_in_every_later_epoch(corpus: Path) -> None:
    order, writer = order_of(corpus), announced(corpus)
    steps = order.batches_before(4)
    given, pool = credit(DATA, BATCH, steps), HerePool(writer)
    with Producing(writer, OnlineSettings(ahead=1, keep=0.25), given, pool) as producing:
        keeper = keeper_of(writer, order, given)
        for _ in read_all(corpus, keeper, order, range(steps)):
            pass
        keeper.close()
        producing.wait()
    kept = kept_units(writer.fingerprint, 24, 0.25)
    assert len(kept) == 6
    assert {unit: pool.computed.count(unit) for unit in kept} == dict.fromkeys(kept, 1)
    assert units_on_disk(writer) == kept
    # Everything else is computed in each of the four epochs, but for what two windows of
    # neighbouring epochs share.
    others = sum(unit not in kept for unit in pool.computed)
    assert 4 * 18 - 3 * 6 <= others <= 4 * 18


def test_a_unit_that_nobody_computes_is_an_error_with_a_remedy(corpus: Path) -> None:
    announced(corpus, patience=0.1)
    with pytest.raises(
        JobError,
        match=r"unit 3 did not come within 0.1 s \(online.patience\) and nothing " r"computes",
    ):
        opened(corpus).read(3)
    with pytest.raises(InputError, match="no unit 24"):
        opened(corpus).read(24)
    with pytest.raises(InputError, match="incomplete"):
        Corpus.open(corpus).text_family("fake")  # to whom waiting is of no use


def test_a_producers_failure_reaches_those_who_wait(corpus: Path) -> None:
    writer = announced(corpus)
    given = credit(DATA, BATCH, 30)

    class Failing(HerePool):
        def finished(self, seconds: float) -> list[Finished]:
            return [Finished(self.waiting.pop(), "failed", InputError("the model has gone"))]

    with Producing(writer, OnlineSettings(), given, Failing(writer)) as producing:
        with pytest.raises(
            JobError, match="unit 3 will not come, its producer failed: the model has gone"
        ):
            opened(corpus).read(3)
        with pytest.raises(InputError, match="the model has gone"):
            producing.wait()


def test_who_leaves_waits_no_longer(corpus: Path) -> None:
    announced(corpus)
    family = opened(corpus)
    family.stop_waiting()
    with pytest.raises(JobError, match="no longer waited for"):
        family.read(3)


def test_a_unit_that_was_deleted_and_computed_again_is_read_anew(corpus: Path) -> None:
    writer, family = announced(corpus), opened(corpus)
    family_job.publish(writer, 3)
    assert family.read(3)
    delete_unit(writer, 3)
    assert units_on_disk(writer) == set()
    family_job.publish(writer, 4)
    assert family.read(4)  # which lets go of the file that is gone
    assert 3 not in family._files
    # With other bits, as of another device: what was known of the first file is no longer true.
    common = writer.shared()
    assert common
    captions = writer.corpus.captions(4)["text"].to_pylist()
    writer.publish(3, family_job.table_of(captions, "int8", common))
    family.verify_unit(3)
    assert all(torch.equal(a, b) for a, b in zip(family.read(4), family.read(3), strict=True))


def test_threads_that_read_at_once_wait_for_their_own_units_alone(corpus: Path) -> None:
    """As a feed's: several read one unit, one waits for a unit that comes late."""
    writer, family = announced(corpus), opened(corpus)
    with ThreadPoolExecutor(8) as threads:
        early = threads.submit(family.read, 23)
        for unit in range(20):
            family_job.publish(writer, unit)
            waiting = [threads.submit(family.read, unit) for _ in range(6)]
            assert len({len(found.result(20)) for found in waiting}) == 1
            if unit > 2:
                delete_unit(writer, unit - 2)
        assert not early.done()
        family_job.publish(writer, 23)
        assert len(early.result(20)) == 8


def test_a_damaged_unit_is_no_reason_to_wait(corpus: Path) -> None:
    writer = announced(corpus)
    family_job.publish(writer, 3)
    file = writer.folder.path / data_files(writer)[0]
    content = bytearray(file.read_bytes())
    content[-200] ^= 1
    file.write_bytes(content)
    with pytest.raises(InputError, match="damaged"):
        opened(corpus).verify_unit(3)


def test_two_runs_on_one_family_share_its_units(corpus: Path) -> None:
    order, writer = order_of(corpus), announced(corpus)
    steps = order.batches_before(1)
    first, second = credit(DATA, BATCH, steps, "first"), credit(DATA, BATCH, steps, "second")
    pool = HerePool(writer)
    publish_credit(writer.folder, second)
    with Producing(writer, OnlineSettings(ahead=1), first, pool) as producing:
        keepers = [keeper_of(writer, order, given) for given in (first, second)]
        ways = [read_all(corpus, keeper, order, range(steps)) for keeper in keepers]
        for one, other in zip(*ways, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
        for keeper in keepers:
            keeper.close()
        producing.wait()
    assert sorted(pool.computed) == list(range(24)), "each unit was to be computed once for both"


def test_a_silent_reader_is_dropped_loudly_and_holds_nobody_up(
    corpus: Path, caplog: pytest.LogCaptureFixture
) -> None:
    order, writer = order_of(corpus), announced(corpus)
    steps = order.batches_before(1)
    given, silent = credit(DATA, BATCH, steps, "first"), credit(DATA, BATCH, steps, "silent")
    publish_credit(writer.folder, silent)  # and never again
    pool = HerePool(writer)
    with (
        caplog.at_level(logging.WARNING),
        Producing(writer, OnlineSettings(ahead=1, patience=0.5), given, pool) as producing,
    ):
        keeper = CreditKeeper([writer.folder], given, order.window_of, 0.5)
        for _ in read_all(corpus, keeper, order, range(steps)):
            pass
        keeper.close()
        producing.wait()
    assert (
        "reader silent was silent for 0.5 s (online.patience) and is dropped at step 0"
        in caplog.text
    )
    assert set(pool.computed) == set(range(24))


def test_a_full_disk_stops_production_until_there_is_room(
    corpus: Path, caplog: pytest.LogCaptureFixture
) -> None:
    order, writer = order_of(corpus), announced(corpus)
    steps = order.batches_before(1)
    given = credit(DATA, BATCH, steps)

    class SmallDisk(HerePool):
        """Room for nine units."""

        def finished(self, seconds: float) -> list[Finished]:
            if self.waiting and len(data_files(self.writer)) >= 9:
                return [
                    Finished(self.waiting.pop(0), "disk full", JobError("No space left on device"))
                ]
            return super().finished(seconds)

    needed = order_of(corpus)
    with Producing(writer, OnlineSettings(ahead=12), given, SmallDisk(writer)) as producing:
        keeper = keeper_of(writer, order, given)
        for step, _ in enumerate(read_all(corpus, keeper, order, range(steps))):
            assert set(needed.batch(step).unit.tolist()) <= units_on_disk(writer), (
                "what is needed was deleted"
            )
        keeper.close()
        producing.wait()
    assert "the disk is full; production waits for room" in caplog.text


def test_a_slow_encoder_is_told_with_the_number_that_would_do(corpus: Path) -> None:
    order, writer = order_of(corpus), announced(corpus)
    steps = order.batches_before(1)
    # A step takes no time at all by its own account, a unit some milliseconds: hundreds of encoders
    # would do.
    given = credit(DATA, BATCH, steps, step_seconds=1e-5)
    with Producing(
        writer, OnlineSettings(ahead=1, max_actors=3), given, HerePool(writer, 1)
    ) as producing:
        publish_credit(writer.folder, given)
        wait_until(lambda: producing.producer.computed >= 4, 30)
    assert producing.last
    assert producing.last.wanted_actors > 3
    assert producing.last.actors == 3, "as many as are allowed were to be added"


def test_waiting_for_encoders_is_data_wait(corpus: Path) -> None:
    """Of a training whose steps take no time it is most of the time."""
    order, writer = order_of(corpus), announced(corpus)
    steps = order.batches_before(1)
    given = credit(DATA, BATCH, steps)

    class Slow(HerePool):
        def finished(self, seconds: float) -> list[Finished]:
            threading.Event().wait(0.05)
            return super().finished(seconds)

    class Texts:
        def assemble(self, batch: GlobalBatch) -> int:
            for unit in set(batch.unit.tolist()):
                family.read(unit)
            return batch.step

    family = opened(corpus)
    with Producing(writer, OnlineSettings(ahead=1), given, Slow(writer)) as producing:
        keeper = keeper_of(writer, order, given)
        feed, began = Feed(order_of(corpus), Texts(), 0, 1, DATA), time.monotonic()
        for step in feed.batches(0, steps):
            keeper.advance(step + 1, 1e-5)
        took = time.monotonic() - began
        keeper.saved(steps)
        keeper.close()
        producing.wait()
    assert took > 24 * 0.05
    assert feed.waited > 0.5 * took


def test_credits_are_read_as_written_and_torn_ones_are_none(corpus: Path) -> None:
    writer = announced(corpus)
    given = credit(DATA, BATCH, 30, step=4, checkpoint=2, beat=7)
    publish_credit(writer.folder, given)
    assert read_credits(writer.folder) == {"run": given}
    file = writer.folder.path / "readers" / "run.json"
    file.write_text(file.read_text().replace('"step": 4', '"step": 5'))
    assert read_credits(writer.folder) == {}


def test_other_bytes_than_at_first_are_told(corpus: Path, caplog: pytest.LogCaptureFixture) -> None:
    writer = announced(corpus)
    family_job.publish(writer, 3)
    delete_unit(writer, 3)
    aside = writer.folder.path / "deleted" / "00003.json"
    first = first_record(writer, 3)
    assert first
    aside.write_bytes(type(first)(**{**first.__dict__, "sha256": "0" * 64}).to_json())
    family_job.publish(writer, 3)
    pool = HerePool(writer)
    producing = Producing(writer, OnlineSettings(), credit(DATA, BATCH, 30), pool)
    producing.producer._take(Finished(3, device="here"))
    assert (
        "unit 3 has other bytes than when it was first computed (sha256 000000000000" in caplog.text
    )
    exact = Producing(writer, OnlineSettings(exact=True), credit(DATA, BATCH, 30), pool)
    exact.producer._take(Finished(3, device="here"))
    with pytest.raises(InputError, match="computed on here and there, whose states differ"):
        exact.producer._take(Finished(3, device="there"))


def _produce_and_die(corpus: str, point: str) -> None:
    """A whole run, killed at its second passage of `point`."""
    os.environ["LIDIT_CRASH_AT"] = point if point == "rolling-announced" else f"{point}:2"
    train_here(Path(corpus))


def train_here(corpus: Path) -> list[torch.Tensor]:
    """Producer and reader in this process, from the reader's own checkpoint, if there is one."""
    order, writer = order_of(corpus), announced(corpus)
    steps = order.batches_before(1)
    found = read_credits(writer.folder).get("run")
    begin = found.checkpoint if found else 0
    given, read = credit(DATA, BATCH, steps, step=begin, checkpoint=begin), []
    with Producing(
        writer, OnlineSettings(ahead=1, budget=10), given, HerePool(writer)
    ) as producing:
        keeper = keeper_of(writer, order, given)
        for states in read_all(corpus, keeper, order, range(begin, steps)):
            read.append(torch.cat(states))
        keeper.close()
        producing.wait()
    return read


@pytest.mark.parametrize(
    "point", [*ROLLING_POINTS, "data-written", "data-renamed", "record-written", "record-renamed"]
)
def test_a_kill_at_every_point_costs_nothing_but_time(point: str, corpus: Path) -> None:
    process = multiprocessing.get_context("fork").Process(
        target=_produce_and_die, args=(str(corpus), point)
    )
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    order = order_of(corpus)
    again = train_here(corpus)
    writer = announced(corpus)
    assert not data_files(writer), "an orphan was left behind"
    # A credit of the reader that has just ended may still be on its way.
    wait_until(lambda: not list(writer.folder.path.rglob(".tmp-*")), 30)
    family_job.run(str(corpus), "int8")
    steps = order.batches_before(1)
    for step, states in zip(range(steps - len(again), steps), again, strict=True):
        assert torch.equal(states, torch.cat(expected_states(corpus, order, step)))


def test_verify_checks_what_is_there(corpus: Path) -> None:
    writer = announced(corpus)
    family_job.publish(writer, 3)
    report = verify_corpus(str(corpus))
    assert report.sound
    assert [note for note in report.notes if "rolling, 1 of 24 units" in note]
    file = writer.folder.path / data_files(writer)[0]
    file.write_bytes(file.read_bytes()[:-1])
    assert not verify_corpus(str(corpus)).sound


def test_a_family_that_was_completed_is_an_ordinary_one(corpus: Path) -> None:
    writer = announced(corpus)
    family_job.publish(writer, 3)
    family_job.run(str(corpus), "int8")
    family = Corpus.open(corpus).text_family("fake", rolling=True)
    assert family.records.num_rows == 24
    assert not writer.corpus.text_families()[0].rolling
