"""The feed: the same global batches for any number of workers, every sample with its own numbers,
damage noticed.
"""

import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from lidit.config import DataSettings
from lidit.data.ahead import copied_ahead, with_tensors
from lidit.data.assembler import TrainingBatch
from lidit.data.families import Families
from lidit.data.feed import Feed, FeedDataset, open_feed
from lidit.data.rows import Part, Rows
from lidit.errors import InputError
from lidit.store import Corpus
from lidit.store.coding.transform import LIMIT, standardise
from lidit.text.local import embed_here
from tests.helpers.trained import SmallWorld

BATCH = 12


def make_feed(
    path: Path, settings: DataSettings, rank: int = 0, world: int = 1, part: Part = "train"
) -> Feed:
    return open_feed(
        Corpus.open(path), settings, batch_size=BATCH, part=part, rank=rank, world_size=world
    )


def whole(feeds: list[Feed], start: int, stop: int) -> list[list[TrainingBatch]]:
    return list(zip(*(feed.batches(start, stop) for feed in feeds)))


@pytest.mark.parametrize("world", [2, 3, 4])
def test_global_batches_do_not_depend_on_the_number_of_workers(
    small_world: SmallWorld, world: int
) -> None:
    settings = DataSettings(window_units=2, caption_dropout=0.3)
    alone = list(make_feed(small_world.corpus, settings).batches(0, 12))
    parts = whole(
        [make_feed(small_world.corpus, settings, rank, world) for rank in range(world)], 0, 12
    )
    for one, shares in zip(alone, parts, strict=True):
        assert one.keys == tuple(key for share in shares for key in share.keys)
        for name in ("latents", "noise", "u"):
            assert torch.equal(
                getattr(one, name), torch.cat([getattr(share, name) for share in shares])
            )
        for name, states in one.text.items():
            rows = [
                s.text[name].states[i][s.text[name].mask[i]]
                for s in shares
                for i in range(len(s.keys))
            ]
            for index, row in enumerate(rows):
                assert torch.equal(states.states[index][states.mask[index]], row)


def test_workers_that_share_a_batch_by_unit_take_the_same_batch(small_world: SmallWorld) -> None:
    drawn = DataSettings(window_units=4)
    by_unit = drawn.model_copy(update={"sort_by_unit": True})
    alone = list(make_feed(small_world.corpus, drawn).batches(0, 8))
    noise = {(one.step, key): value for one in alone for key, value in zip(one.keys, one.noise)}
    for one, parts in zip(
        alone, whole([make_feed(small_world.corpus, by_unit, rank, 3) for rank in range(3)], 0, 8)
    ):
        assert sorted(one.keys) == sorted(key for part in parts for key in part.keys)
        for part in parts:
            for key, value in zip(part.keys, part.noise):
                assert torch.equal(value, noise[part.step, key])
    held = [
        settings.model_copy(update={"validation_fraction": 0.3}) for settings in (drawn, by_unit)
    ]
    first, second = (
        next(make_feed(small_world.corpus, one, part="validation").batches(0, 1)) for one in held
    )
    assert first.keys == second.keys  # whose noise goes by the place in the batch


def test_every_tensor_of_a_batch_is_changed_and_nothing_else(small_world: SmallWorld) -> None:
    batch = next(make_feed(small_world.corpus, DataSettings()).batches(0, 1))
    twice = with_tensors(batch, lambda tensor: torch.cat([tensor, tensor]))
    assert (twice.keys, twice.step, twice.tokens) == (batch.keys, batch.step, batch.tokens)
    assert len(twice.noise) == len(twice.latents) == len(twice.u) == 2 * BATCH
    for name, states in batch.text.items():
        found = twice.text[name]
        assert [len(t) for t in (found.states, found.mask)] == [2 * BATCH] * 2
        assert len(found.prefix) == 2 * len(states.prefix)


def test_a_batch_is_on_its_way_before_the_one_before_it_is_worked_on(
    small_world: SmallWorld,
) -> None:
    begun = []

    def read() -> Iterator[TrainingBatch]:
        for batch in make_feed(small_world.corpus, DataSettings()).batches(0, 4):
            begun.append(batch.step)
            yield batch

    copies = copied_ahead(read(), torch.device("cpu"))
    for step, wanted in enumerate(make_feed(small_world.corpus, DataSettings()).batches(0, 4)):
        batch = next(copies)
        assert begun[-1] == min(step + 1, 3)
        assert batch.keys == wanted.keys
        assert torch.equal(batch.text["qwen2"].states, wanted.text["qwen2"].states)
    assert next(copies, None) is None
    assert next(copied_ahead([], torch.device("cpu")), None) is None


def test_resuming_anywhere_gives_the_batches_of_the_uninterrupted_run(
    small_world: SmallWorld,
) -> None:
    settings = DataSettings(window_units=2)
    straight = list(make_feed(small_world.corpus, settings).batches(0, 20))
    per_epoch = 97 // BATCH
    for start in (1, per_epoch - 1, per_epoch, per_epoch + 1, 19):
        resumed = next(make_feed(small_world.corpus, settings).batches(start, 20))
        assert resumed.keys == straight[start].keys
        assert torch.equal(resumed.noise, straight[start].noise)
        assert torch.equal(resumed.text["qwen2"].states, straight[start].text["qwen2"].states)


def test_every_key_once_per_epoch_and_noise_of_its_own(small_world: SmallWorld) -> None:
    # 12 epochs of 97
    batches = list(make_feed(small_world.corpus, DataSettings(window_units=2)).batches(0, 97))
    counts = Counter(key for batch in batches for key in batch.keys)
    assert set(counts.values()) == {12}
    assert len(counts) == 97
    noise = torch.cat([batch.noise.flatten(1)[:, :8] for batch in batches])
    assert len(torch.unique(noise, dim=0)) == len(noise), "two samples got the same noise"
    assert abs(noise.mean()) < 0.02
    assert abs(noise.std() - 1) < 0.02


def test_rows_match_the_store(small_world: SmallWorld) -> None:
    """What is fed for a key is what the corpus holds for it: the image and one of its captions."""
    corpus = small_world.open()
    settings = DataSettings(window_units=2, caption_dropout=0.0)
    where = {
        k: (u, r)
        for u in range(corpus.num_units)
        for r, k in enumerate(corpus.samples(u)["key"].to_pylist())
    }
    batch = next(make_feed(small_world.corpus, settings).batches(3, 4))
    family, latents = corpus.text_family("llama"), corpus.latent_family("pixels")
    for index, key in enumerate(batch.keys):
        unit, row = where[key]
        assert torch.equal(batch.latents[index], latents.read(unit, [row])[0])
        allowed = [c["index"] for c in corpus.samples(unit)["captions"][row].as_py()]
        states = batch.text["llama"]
        fed = states.states[index][states.mask[index]]
        assert any(torch.equal(fed, stored) for stored in family.read(unit, allowed))


def test_dropout_gives_the_empty_caption_to_all_llms_together(small_world: SmallWorld) -> None:
    settings = DataSettings(window_units=2, caption_dropout=0.5)
    corpus = small_world.open()
    empty = {name: corpus.text_family(name).shared().empty.float() for name in ("llama", "qwen2")}
    dropped = []
    for batch in make_feed(small_world.corpus, settings).batches(0, 16):
        for index in range(len(batch.keys)):
            is_empty = []
            for name, states in batch.text.items():
                fed = states.states[index][states.mask[index]].float()
                is_empty.append(fed.shape == empty[name].shape and torch.equal(fed, empty[name]))
            assert len(set(is_empty)) == 1
            dropped.append(is_empty[0])
    assert 0.35 < np.mean(dropped) < 0.65


def test_origin_weights_choose_the_captions(small_world: SmallWorld) -> None:
    rows = Rows(small_world.open(), DataSettings(origin_weights={"synthetic": 1.0}))
    info = rows.unit(0)
    samples = small_world.open().samples(0)["captions"].to_pylist()
    for row, captions in enumerate(samples):
        origins = {c["index"]: c["origin"] for c in captions}
        numbers = np.linspace(0, 1 - 2**-53, 7)
        chosen = {origins[index] for index in info.choose(np.full(7, row), numbers).tolist()}
        assert chosen == (
            {"synthetic"} if "synthetic" in origins.values() else set(origins.values())
        )


def test_validation_rows_are_never_trained(small_world: SmallWorld) -> None:
    settings = DataSettings(window_units=2, validation_fraction=0.2)
    keys = {}
    for part in ("train", "validation"):
        feed = make_feed(small_world.corpus, settings, part=part)
        batches = feed.batches(0, feed.order.batches_before(BATCH))
        keys[part] = {key for batch in batches for key in batch.keys}
    assert not keys["train"] & keys["validation"]
    assert len(keys["train"] | keys["validation"]) == 97
    assert 12 <= len(keys["validation"]) <= 28


def test_a_flipped_bit_stops_before_its_number_is_used(
    small_world: SmallWorld, tmp_path: Path
) -> None:
    copy = tmp_path / "corpus"
    shutil.copytree(small_world.corpus, copy)
    victim = sorted((copy / "text").glob("llama-*/00002-*.arrow"))[0]
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    feed = make_feed(copy, DataSettings(window_units=2))
    with pytest.raises(InputError, match=victim.name):
        list(feed.batches(0, 9))


def test_coded_captions_come_as_steps_that_are_their_states(
    small_world: SmallWorld, tmp_path: Path
) -> None:
    copy = tmp_path / "corpus"
    shutil.copytree(small_world.corpus, copy)
    shutil.rmtree(copy / "text")
    for encoder in small_world.encoders:
        embed_here(str(copy), encoder.model_copy(update={"storage": "coded", "storage_error": 0.2}))
    corpus, settings = Corpus.open(copy), DataSettings(window_units=2, caption_dropout=0.3)
    plain, coded = (
        open_feed(corpus, settings, batch_size=BATCH, coded=coded) for coded in (False, True)
    )
    for one, other in zip(plain.batches(0, 4), coded.batches(0, 4), strict=True):
        assert one.keys == other.keys
        assert one.tokens == other.tokens
        for name, states in one.text.items():
            shared, steps = corpus.text_family(name).shared(), other.text[name]
            assert steps.states.dtype == torch.int16
            assert steps.size is not None
            assert shared.code is not None
            assert torch.equal(states.mask, steps.mask)
            assert torch.equal(states.prefix, steps.prefix)
            z = (steps.states.float() @ shared.code.back * steps.size[..., None]).clamp(
                -LIMIT, LIMIT
            )
            expected = standardise(states.states, shared.mean, shared.deviation)
            assert torch.allclose(z[steps.mask], expected[steps.mask], atol=2e-3)
        (half, _) = other.split(2)
        assert half.text["llama"].size is not None
        assert half.text["llama"].size.shape == half.text["llama"].mask.shape


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_int8_captions_come_as_they_are_stored(
    small_world: SmallWorld, tmp_path: Path, dropout: float
) -> None:
    """A byte a number, two where an empty caption, which is not quantised, stands among them."""
    copy = tmp_path / "corpus"
    shutil.copytree(small_world.corpus, copy)
    shutil.rmtree(copy / "text")
    for encoder in small_world.encoders:
        embed_here(str(copy), encoder.model_copy(update={"storage": "int8"}))
    corpus, settings = Corpus.open(copy), DataSettings(window_units=2, caption_dropout=dropout)
    plain, stored = (
        open_feed(corpus, settings, batch_size=BATCH, coded=coded) for coded in (False, True)
    )
    for one, other in zip(plain.batches(0, 4), stored.batches(0, 4), strict=True):
        assert one.keys == other.keys
        for name, states in one.text.items():
            family, steps = corpus.text_family(name), other.text[name]
            assert family.has_steps
            assert steps.states.dtype == (torch.int16 if dropout else torch.int8)
            assert steps.size is not None
            assert torch.equal(states.mask, steps.mask)
            shared = family.shared()
            z = (steps.states * steps.size[..., None]).clamp(-LIMIT, LIMIT)
            expected = standardise(states.states, shared.mean, shared.deviation)
            assert torch.allclose(z[steps.mask], expected[steps.mask], atol=2e-3)


def test_a_torch_loader_yields_the_feeds_batches(small_world: SmallWorld) -> None:
    settings = DataSettings(window_units=2)
    feed = make_feed(small_world.corpus, settings)
    loader = DataLoader(FeedDataset(feed, 3), batch_size=None)
    assert len(loader) == 97 // BATCH - 3
    expected = list(make_feed(small_world.corpus, settings).batches(3, 97 // BATCH))
    for batch, wanted in zip(loader, expected, strict=True):
        assert batch.keys == wanted.keys
        assert torch.equal(batch.noise, wanted.noise)
        assert torch.equal(batch.text["qwen2"].states, wanted.text["qwen2"].states)


def test_a_loader_with_worker_processes_is_refused(small_world: SmallWorld) -> None:
    """Every process would yield the same batches: a training would see samples several times."""
    feed = make_feed(small_world.corpus, DataSettings(window_units=2))
    with pytest.raises(InputError, match="num_workers=0"):
        next(iter(DataLoader(FeedDataset(feed), batch_size=None, num_workers=1)))


@pytest.mark.parametrize(("rank", "world"), [(2, 2), (-1, 2), (0, BATCH + 1)])
def test_a_rank_without_samples_is_refused(small_world: SmallWorld, rank: int, world: int) -> None:
    with pytest.raises(InputError, match=f"rank {rank} of {world}"):
        make_feed(small_world.corpus, DataSettings(), rank, world)


def test_a_feed_of_nothing_held_out_is_refused(small_world: SmallWorld) -> None:
    with pytest.raises(InputError, match="validation_fraction"):
        make_feed(small_world.corpus, DataSettings(), part="validation")


def test_families_are_found_or_asked_for(small_world: SmallWorld, tmp_path: Path) -> None:
    corpus = small_world.open()
    chosen = Families.open(corpus, DataSettings(window_units=100), texts={"mine": "qwen2"})
    assert chosen.widths == {"mine": 48}
    assert chosen.latent_shape == (3, 32, 32)
    # a border has two windows
    assert chosen.latents.keep_open == chosen.texts["mine"].keep_open == 200
    copy = tmp_path / "corpus"
    shutil.copytree(small_world.corpus, copy)
    shutil.rmtree(copy / "latents")
    with pytest.raises(InputError, match="lidit latents"):
        Families.open(Corpus.open(copy), DataSettings())
    shutil.rmtree(copy / "text")
    with pytest.raises(InputError, match="lidit embed"):
        Families.open(Corpus.open(copy), DataSettings())
