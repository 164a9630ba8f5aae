"""Rolling families on real Ray: real encoders compute what a reader needs next, and the offline
family's bytes.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lidit.config import DataSettings, OnlineSettings, PoolSettings
from lidit.data.assembler import TrainingBatch
from lidit.data.credit import CreditKeeper
from lidit.data.families import Families
from lidit.data.feed import open_feed
from lidit.data.producer import State
from lidit.data.rows import Rows
from lidit.errors import InputError
from lidit.store import Corpus
from lidit.store.janitor import first_record
from lidit.store.rolling import PRODUCER_FILE
from lidit.store.schema import unseal
from pipelines.corpus.embed import run_embed
from pipelines.corpus.encode_units import EncodeJob
from pipelines.corpus.rolling import (
    ActorPool,
    RollingRun,
    announce,
    producing,
    run_rolling,
    too_slow,
)
from tests.helpers.rolling import credit, units_on_disk
from tests.helpers.trained import SmallWorld
from tests.helpers.waiting import wait_until

DATA = DataSettings(window_units=2)
BATCH = 12


@pytest.fixture(scope="module")
def bare(small_world: SmallWorld, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small world's corpus without its text families."""
    folder = tmp_path_factory.mktemp("bare") / "corpus"
    shutil.copytree(small_world.corpus, folder, ignore=shutil.ignore_patterns("text"))
    return folder


def actors_of(job: EncodeJob) -> int:
    """By the producer's own account."""
    return int(unseal(job.writer().folder.read_bytes(PRODUCER_FILE))["actors"])


@pytest.mark.slow
@pytest.mark.parametrize("trainers", [1, 3])
def test_trainers_read_what_whole_families_hold(
    trainers: int, small_world: SmallWorld, bare: Path, tmp_path: Path
) -> None:
    """Order, captions, latents, noise and states, for any number of trainers, through a budget of
    six units; also where other encoders join in the middle: steps that take no time ask for many.
    """
    corpus = tmp_path / "corpus"
    shutil.copytree(bare, corpus)
    order = Rows(Corpus.open(corpus), DATA).order(BATCH)
    steps = order.batches_before(2)
    online, given = OnlineSettings(ahead=1, budget=6, max_actors=2), credit(DATA, BATCH, steps)
    run = RollingRun(online, given)
    made = [
        announce(str(corpus), encoder, PoolSettings(cpus=1), run)
        for encoder in small_world.encoders
    ]
    jobs = [job for job in made if job]
    assert len(jobs) == 2
    whole = open_feed(small_world.open(), DATA, batch_size=BATCH)
    families = [
        Families.open(Corpus.open(corpus), DATA) for _ in range(trainers)
    ]  # of a process each
    feeds = [
        open_feed(
            Corpus.open(corpus),
            DATA,
            batch_size=BATCH,
            rank=rank,
            world_size=trainers,
            families=families[rank],
        )
        for rank in range(trainers)
    ]
    with producing(jobs, run) as summaries:
        folders = [family.folder for family in families[0].rolling]
        keeper = CreditKeeper(folders, given, order.window_of, online.patience)
        ways = [feed.batches(0, steps) for feed in feeds]
        for step, (offline, *parts) in enumerate(zip(whole.batches(0, steps), *ways, strict=True)):
            same_batches(offline, parts)
            assert max(len(units_on_disk(job.writer())) for job in jobs) <= 6
            keeper.advance(step + 1, 0.01)
            keeper.saved(step + 1)
            if step == steps // 2:
                wait_until(lambda: [actors_of(job) for job in jobs] == [2, 2], 300)
        keeper.close()
    assert {summary.directory for summary in summaries} == {job.writer().directory for job in jobs}
    for job in jobs:
        summary = next(s for s in summaries if s.directory == job.writer().directory)
        assert summary.computed >= 2 * 5 - 4
        assert summary.on_disk == 0
        assert units_on_disk(job.writer()) == set()
        # The bytes of every unit's first computation; a later one with others would have been told.
        offline_family = small_world.open().text_family(job.spec.name)
        for unit in range(5):
            first = first_record(job.writer(), unit)
            assert first
            assert first.sha256 == offline_family.record(unit)["sha256"]


def same_batches(whole: TrainingBatch, parts: Sequence[TrainingBatch]) -> None:
    """To the last bit; texts are padded to the longest caption of each trainer's own part."""
    assert whole.keys == tuple(key for part in parts for key in part.keys)
    for name in ("latents", "noise", "u"):
        together = torch.cat([getattr(part, name) for part in parts])
        assert torch.equal(getattr(whole, name), together), name
    for encoder, offline in whole.text.items():
        rows = [
            states[mask]
            for part in parts
            for states, mask in zip(part.text[encoder].states, part.text[encoder].mask, strict=True)
        ]
        wanted = [states[mask] for states, mask in zip(offline.states, offline.mask, strict=True)]
        assert all(torch.equal(a, b) for a, b in zip(wanted, rows, strict=True))
        assert all(torch.equal(offline.prefix, part.text[encoder].prefix) for part in parts)


@pytest.mark.slow
def test_an_actor_without_room_holds_no_unit(
    small_world: SmallWorld, bare: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Of two that ask for four of six CPUs each one must do it all. A code is told of before."""
    coded = small_world.encoders[0].model_copy(update={"storage": "coded"})
    run = RollingRun(OnlineSettings(), credit(DATA, BATCH, 8))
    job = announce(str(bare), coded, PoolSettings(cpus=4), run)
    assert job
    assert "bits per dimension" in caplog.text
    job = replace(job, pool=PoolSettings(actors=2, cpus=4))
    actors, left, done = ActorPool(job), list(range(5)), list[int]()

    def all_done() -> bool:
        while left and actors.slots > 0:
            actors.start(left.pop())
        done.extend(unit.unit for unit in actors.finished(0.1))
        return sorted(done) == list(range(5))

    wait_until(all_done, 300)
    assert actors.actors == 1
    actors.resize(1)
    assert actors.actors == 1, "the one that had started was taken"
    actors.close()


def test_a_family_that_is_being_rolled_is_not_computed_as_a_whole_and_a_whole_one_not_rolled(
    small_world: SmallWorld, bare: Path
) -> None:
    encoder = small_world.encoders[0]
    run = RollingRun(OnlineSettings(ahead=1), credit(DATA, BATCH, 8, run="another"))
    job = announce(str(bare), encoder, PoolSettings(), run)
    assert job
    with producing([job], run):
        while not (job.writer().folder.path / "producer.json").exists():
            threading.Event().wait(0.02)
        with pytest.raises(InputError, match="is being computed as it is read"):
            run_embed(str(bare), encoder, PoolSettings())
    # Nobody rolls it now: what is there is kept and the rest computed.
    run_embed(str(bare), encoder, PoolSettings())
    assert announce(str(bare), encoder, PoolSettings(), run) is None
    assert run_rolling([], run, lambda state: None) == []


def test_a_budget_too_small_for_a_window_is_refused_before_anything_is_computed(
    small_world: SmallWorld, bare: Path, tmp_path: Path
) -> None:
    corpus = tmp_path / "corpus"
    shutil.copytree(bare, corpus, ignore=shutil.ignore_patterns("text"))
    run = RollingRun(OnlineSettings(budget=1), credit(DATA, BATCH, 8))
    with pytest.raises(
        InputError, match=r"online.budget: 1 units are too few, the window in use needs 2 at once"
    ):
        announce(str(corpus), small_world.encoders[0], PoolSettings(), run)
    assert not list(corpus.glob("text/*/shared.arrow"))


def test_too_few_encoders_are_told_with_the_number_that_would_do() -> None:
    waiting = State("llama", 3, 1, -1, 2, 5, 7, 0, ("run",))
    assert too_slow(waiting) == (
        "llama: training waits for states: 2 encoder actors are too few, 5 would do"
    )
    assert too_slow(replace(waiting, ahead=0)) == ""
    assert too_slow(replace(waiting, actors=5)) == ""
