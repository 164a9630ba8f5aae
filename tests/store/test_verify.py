"""Every bit of a corpus is watched: a flip or a cut anywhere is found, named, and repaired by
computing just that.
"""

import shutil
import tracemalloc
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pyarrow as pa
import pytest
import torch

from lidit.errors import InputError
from lidit.store import Corpus, FamilyWriter, TextFamily, latents_table, text_table
from lidit.store.checks.again import spread_rows
from lidit.store.latent_file import Crop
from lidit.store.repair import repair_corpus
from lidit.store.schema import seal, unseal
from lidit.store.verify import verify_corpus
from tests.helpers import family_job
from tests.helpers.corpus_factory import WORDS, make_corpus

UNITS = [WORDS, ("one", "two")]


def build(path: Path) -> Path:
    make_corpus(path, UNITS)
    family_job.run(str(path), "int8")
    writer = FamilyWriter.open_or_create(str(path), "latents", "codec", {"x": 1})
    for unit, captions in enumerate(UNITS):
        latents = [torch.full((2, 3, 3), float(i)) for i in range(len(captions))]
        writer.publish(unit, latents_table(latents, [Crop(0, 0, 3, 3)] * len(captions), "float32"))
    writer.finish()
    return path


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return build(tmp_path / "corpus")


def all_files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file())


def test_sound_corpus_has_no_problem(corpus: Path) -> None:
    report = verify_corpus(str(corpus), deep=True)
    assert report.sound, report.problems
    assert report.files == 2 + 4 + (1 + 1 + 2) + (1 + 2)
    assert not report.notes


def test_a_flipped_bit_or_a_cut_in_any_file_is_found_and_named(corpus: Path) -> None:
    for path in all_files(corpus):
        original = path.read_bytes()
        for place in (0, len(original) // 3, len(original) // 2, len(original) - 1):
            path.write_bytes(
                original[:place] + bytes([original[place] ^ 4]) + original[place + 1 :]
            )
            _must_name(corpus, path)
        path.write_bytes(original[: len(original) // 2])
        _must_name(corpus, path)
        path.unlink()
        path.mkdir()
        _must_name(corpus, path)
        path.rmdir()
        if path.name != "MANIFEST.json":
            _must_name(corpus, path)
        else:
            assert "unfinished" in verify_corpus(str(corpus)).notes[0]
        path.write_bytes(original)
    assert verify_corpus(str(corpus)).sound


def _must_name(corpus: Path, path: Path) -> None:
    if path.name == "corpus.json":
        with pytest.raises(InputError, match="corpus"):
            verify_corpus(str(corpus))
        return
    problems = verify_corpus(str(corpus)).problems
    assert any(path.name in problem.file for problem in problems), path
    assert all(problem.remedy for problem in problems)


def test_repair_takes_only_what_is_bad_and_the_rest_is_not_computed_again(
    corpus: Path, tmp_path: Path
) -> None:
    pristine = build(tmp_path / "pristine")
    (corpus / "captions" / "keep").write_text("")
    family = next((corpus / "text").iterdir())
    data = next(family.glob("00001-*.arrow"))
    content = data.read_bytes()
    data.write_bytes(content[:-9] + b"x" + content[-8:])
    report = verify_corpus(str(corpus))
    removed = repair_corpus(str(corpus), report.problems)
    assert sorted(Path(name).name[:8] for name in removed) == [
        "00001-" + data.name[6:8],
        "00001.js",
        "MANIFEST",
        "MANIFEST",
    ]
    with pytest.raises(InputError, match="incomplete"):
        Corpus.open(corpus).text_family("fake")
    assert family_job.run(str(corpus), "int8") == [1]
    assert verify_corpus(str(corpus), deep=True).sound
    one, other = (Corpus.open(p).text_family("fake").digest for p in (corpus, pristine))
    assert one == other


@pytest.mark.parametrize("name", ["shared.arrow", "family.json"])
def test_without_spec_or_shared_states_the_whole_family_goes(corpus: Path, name: str) -> None:
    family = next((corpus / "text").iterdir())
    content = (family / name).read_bytes()
    (family / name).write_bytes(content[:20] + bytes([content[20] ^ 8]) + content[21:])
    before = Corpus.open(corpus).latent_family("codec").digest
    repair_corpus(str(corpus), verify_corpus(str(corpus)).problems)
    assert [p.name for p in family.iterdir()] == (["family.json"] if name == "shared.arrow" else [])
    assert family_job.run(str(corpus), "int8") == [0, 1]
    assert verify_corpus(str(corpus), deep=True).sound
    assert Corpus.open(corpus).latent_family("codec").digest == before


def test_what_ingest_wrote_is_never_deleted(corpus: Path) -> None:
    path = corpus / "samples" / "00000.arrow"
    path.write_bytes(path.read_bytes()[:-1])
    problems = verify_corpus(str(corpus)).problems
    assert repair_corpus(str(corpus), problems) == []
    assert "new folder" in problems[0].remedy
    # the remedy it names works: the families of the same contents are accepted
    fresh = corpus.parent / "fresh"
    make_corpus(fresh, UNITS)
    for kind in ("text", "latents"):
        (corpus / kind).rename(fresh / kind)
    assert verify_corpus(str(fresh), deep=True).sound


def test_deep_finds_values_no_checksum_can_see(corpus: Path) -> None:
    writer = FamilyWriter.open_or_create(str(corpus), "text", "nan", {"y": 1})
    writer.write_shared(family_job.shared())
    for unit, captions in enumerate(UNITS):
        states = [torch.ones(len(c), family_job.WIDTH) for c in dict.fromkeys(captions)]
        table = text_table([[0] * len(s) for s in states], states, "float32", family_job.WIDTH)
        # what a writer with a bug, or with memory that flips bits, could have published
        if unit == 1:
            poisoned = torch.cat(states).reshape(-1)
            poisoned[5] = float("nan")
            column = pa.LargeListArray.from_arrays(
                table["states"].chunk(0).offsets, pa.array(poisoned.numpy())
            )
            table = pa.table(
                [table["tokens"], table["crc32c"], column, table["token_ids"]], schema=table.schema
            )
        writer.publish(unit, table)
    writer.finish()
    assert verify_corpus(str(corpus)).sound
    problems = verify_corpus(str(corpus), deep=True).problems
    assert ["not finite" in p.reason and p.unit == 1 for p in problems] == [True]


@pytest.mark.parametrize("group", ["samples", "captions"])
def test_a_reader_names_the_remedy_that_works(corpus: Path, group: str) -> None:
    (corpus / group / "00001.arrow").unlink()
    (problem,) = verify_corpus(str(corpus)).problems
    with pytest.raises(InputError, match=rf"{group}/00001\.arrow: missing; {problem.remedy}"):
        getattr(Corpus.open(corpus), group)(1)


def family_of(rows: list[int]) -> TextFamily:
    return cast(TextFamily, SimpleNamespace(records=pa.table({"rows": pa.array(rows, pa.int32())})))


def test_rows_to_compute_again_are_drawn_from_all_and_only_from_those_there_are() -> None:
    rows = [0, 3, 0, 0, 2, 1, 0]
    everything = [(unit, list(range(count))) for unit, count in enumerate(rows) if count]
    assert list(spread_rows(family_of(rows), 16)) == everything
    drawn = list(spread_rows(family_of(rows), 4))
    assert drawn == list(spread_rows(family_of(rows), 4))
    assert sum(len(found) for _, found in drawn) == 4
    assert all(set(found) <= set(range(rows[unit])) for unit, found in drawn)
    assert list(spread_rows(family_of([]), 4)) == list(spread_rows(family_of([0]), 4)) == []


def test_drawing_a_few_rows_takes_no_memory_for_the_others() -> None:
    family = family_of([1000] * 300)
    tracemalloc.start()
    try:
        assert len(list(spread_rows(family, 16))) > 10
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most < 1_000_000, "300 000 rows are listed to choose 16"


def test_some_rows_are_computed_again(corpus: Path) -> None:
    def encode(family: TextFamily, captions: list[str]) -> list[torch.Tensor]:
        return [family_job.states_of(caption)[1] for caption in captions]

    report = verify_corpus(str(corpus), encode=encode, encode_rows=5)
    assert report.sound, report.problems
    assert report.rows_encoded_again == 5

    def shifted(family: TextFamily, captions: list[str]) -> list[torch.Tensor]:
        return [states + family.shared().deviation * 0.2 for states in encode(family, captions)]

    report = verify_corpus(str(corpus), encode=shifted, encode_rows=8)
    assert 0 < len(report.problems) <= 8
    assert "when computed again" in report.problems[0].reason


def test_a_changed_caption_never_gets_states(corpus: Path) -> None:
    """The file is a sound Arrow file of as many rows; only its checksum tells."""
    path = corpus / "captions" / "00001.arrow"
    content = path.read_bytes()
    assert content.count(b"one") == 1
    path.write_bytes(content.replace(b"one", b"our"))
    with pytest.raises(
        InputError, match=r"captions/00001.arrow: damaged .*; ingest the same " r"sources"
    ):
        Corpus.open(corpus).captions(1)
    whole = Corpus.open(corpus)
    assert whole.captions(0)["text"].to_pylist() == list(WORDS)
    path.write_bytes(content)
    assert whole.captions(1)["text"].to_pylist() == ["one", "two"]


def test_a_unit_names_the_captions_it_was_made_from(corpus: Path) -> None:
    """States of other captions, moved over with records that are whole, are found and computed
    again.
    """
    other = corpus.parent / "other"
    make_corpus(other, [WORDS, ("six", "two")])
    family_job.run(str(other), "int8")
    family = next((corpus / "text").iterdir()).name
    record = unseal((corpus / "text" / family / "00001.json").read_bytes())
    assert record["of"] == Corpus.open(corpus).digest_of_unit("captions", 1)
    theirs = unseal((other / "text" / family / "00001.json").read_bytes())
    assert theirs["of"] != record["of"]
    (corpus / "text" / family / "00001.json").write_bytes(seal({**record, "of": theirs["of"]}))
    (problem,) = verify_corpus(str(corpus)).problems
    assert "was made from other captions than the corpus has" in str(problem)
    repair_corpus(str(corpus), [problem])
    assert family_job.run(str(corpus), "int8") == [1]
    assert verify_corpus(str(corpus)).sound


def test_records_of_the_first_release_name_no_captions_and_count(corpus: Path) -> None:
    family = next((corpus / "text").iterdir())
    for path in family.glob("0000?.json"):
        record = unseal(path.read_bytes())
        del record["of"]
        path.write_bytes(seal(record))
    assert verify_corpus(str(corpus)).sound
    (family / "MANIFEST.json").unlink()
    assert family_job.run(str(corpus), "int8") == []


@pytest.mark.parametrize("name", ["family.json", "MANIFEST.json"])
def test_a_whole_file_of_another_family_is_found_and_repaired(corpus: Path, name: str) -> None:
    text, latents = next((corpus / "text").iterdir()), next((corpus / "latents").iterdir())
    (text / name).write_bytes((latents / name).read_bytes())
    report = verify_corpus(str(corpus))
    assert any(problem.file.endswith(f"{text.name}/{name}") for problem in report.problems)
    repair_corpus(str(corpus), report.problems)
    family_job.run(str(corpus), "int8")
    assert verify_corpus(str(corpus), deep=True).sound
    assert len(Corpus.open(corpus).text_family(text.name).read(1)) == 2


def test_a_family_of_another_corpus_is_found(corpus: Path) -> None:
    other = corpus.parent / "other"
    make_corpus(other, [WORDS, ("six", "two")])
    family_job.run(str(other), "int8")
    family = next((other / "text").iterdir())
    family.rename(family.with_name("away"))
    shutil.copytree(next((corpus / "text").iterdir()), family)
    shutil.rmtree(family.with_name("away"))
    assert "was made for another corpus" in str(verify_corpus(str(other)).problems[0])


def test_the_record_of_another_unit_is_found(corpus: Path) -> None:
    family = next((corpus / "text").iterdir())
    (family / "00001.json").write_bytes((family / "00000.json").read_bytes())
    assert "00001.json: is the commit record of unit 0" in str(
        verify_corpus(str(corpus)).problems[0]
    )
