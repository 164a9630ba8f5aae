"""Captions that several units repeat are computed once, whichever way the work is spread."""

from pathlib import Path

import pytest
import torch

from lidit.config import PoolSettings
from lidit.store import Corpus, FamilyWriter
from lidit.store.distinct import CaptionIndex, distinct_corpus
from lidit.store.writer import SHARED_FILE
from lidit.text import resolve_encoder
from pipelines.corpus.distinct import assemble_unit, embed_corpus
from pipelines.corpus.embed import run_embed
from pipelines.corpus.encode_units import EncodeJob
from tests.helpers.corpus_factory import make_corpus
from tests.helpers.embed_job import contents, embed_here, encoder
from tests.helpers.tiny_models import tiny_llm

# Of 12 captions 7 differ; the last unit has none of its own.
UNITS = (
    ("a red circle", "a blue square", "", "two"),
    ("a blue square", "three of them", "a red circle"),
    ("four", "three of them", "a much longer caption of many words"),
    ("two", "four"),
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llm(tmp_path_factory.mktemp("llama"), "llama")


def test_the_index_names_the_first_unit_that_has_a_caption(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path / "corpus", UNITS)
    index = CaptionIndex.of(corpus)
    assert index.distinct == 7
    once = distinct_corpus(corpus, index)
    for unit, captions in enumerate(UNITS):
        owners, rows = index.unit(unit)
        found = [
            once.captions(int(o))["text"].to_pylist()[int(r)]
            for o, r in zip(owners, rows, strict=True)
        ]
        assert found == corpus.captions(unit)["text"].to_pylist()
        assert sorted(found) == sorted(captions)
    assert once.units["captions"].to_pylist() == [4, 1, 2, 0]
    assert distinct_corpus(corpus, index).digest == once.digest


def test_units_are_put_together_in_their_captions_order(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LIDIT_CACHE", str(tmp_path / "cache"))
    settings = encoder(model, max_tokens=12)
    plain, corpus = (make_corpus(tmp_path / name, UNITS) for name in ("plain", "corpus"))
    embed_here(tmp_path / "plain", settings)
    (expected,) = plain.text_families()
    spec = resolve_encoder(settings, "cpu")
    index = CaptionIndex.of(corpus)
    once = distinct_corpus(corpus, index).folder.location
    for place in (corpus.folder.location, once):
        writer = FamilyWriter.open_or_create(place, "text", spec.name, spec.to_dict())
        shared = plain.folder.child("text").child(expected.directory).read_table(SHARED_FILE)
        writer.write_shared(shared)
    embed_here(Path(once), settings)
    job = EncodeJob(corpus.folder.location, settings, spec, PoolSettings())
    for unit in (2, 0, 3, 1):
        assemble_unit(job, once, unit, *index.unit(unit))
    job.writer().finish()
    same_to_every_reader(plain, Corpus.open(corpus.folder.location))


def same_to_every_reader(plain: Corpus, corpus: Corpus) -> None:
    """The fingerprint, the shared states and the counts are the same; states differ by rounding."""
    expected, found = (
        each.text_family(each.text_families()[0].directory) for each in (plain, corpus)
    )
    assert expected.fingerprint == found.fingerprint
    assert expected.shared().sha256 == found.shared().sha256
    counts = expected.manifest["counts"]
    assert counts["truncated"] > 0
    assert counts | found.manifest["counts"] == counts
    for unit, captions in enumerate(UNITS):
        assert expected.token_ids(unit) == found.token_ids(unit)
        states = found.read(unit, check=True)
        for a, b in zip(expected.read(unit), states, strict=True):
            torch.testing.assert_close(a, b, rtol=0.02, atol=0.02)
        rows = range(len(captions))
        alone = [found.read(unit, [row], check=True)[0] for row in rows]
        assert all(map(torch.equal, alone, states))


@pytest.mark.slow
def test_the_family_is_the_same_for_any_number_of_actors(
    tmp_path: Path, model: Path, ray_cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LIDIT_CACHE", str(tmp_path / "cache"))
    settings = encoder(model, max_tokens=12)
    plain, one, two = (make_corpus(tmp_path / name, UNITS) for name in ("plain", "one", "two"))
    expected_of = run_embed(plain.folder.location, settings, PoolSettings())
    made = embed_corpus(one.folder.location, settings, PoolSettings(distinct=True))
    assert (made.captions, made.units, made.computed_units) == (12, 4, 4)
    assert made.truncated == expected_of.truncated > 0
    assert not list(Path(one.folder.location).glob("distinct/text/*"))
    embed_corpus(two.folder.location, settings, PoolSettings(actors=2, distinct=True))
    assert contents(Path(one.folder.location)) == contents(Path(two.folder.location))

    same_to_every_reader(plain, Corpus.open(one.folder.location))

    # Finished: nothing is computed. A unit that is mended later is computed alone.
    again = embed_corpus(one.folder.location, settings, PoolSettings(distinct=True))
    assert (again.computed_units, again.padding_waste) == (0, 0.0)
    folder = Path(one.folder.location, "text", made.directory)
    for name in ("MANIFEST.json", "00001.json"):
        (folder / name).unlink()
    mended = embed_corpus(one.folder.location, settings, PoolSettings(distinct=True))
    assert mended.computed_units == 1
    assert not list(Path(one.folder.location).glob("distinct/text/*"))
