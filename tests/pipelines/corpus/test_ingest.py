"""Ingest end to end: nothing lost, nothing doubled, resumable, refused where it would mix things
up.
"""

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lidit.config import IngestSettings
from lidit.errors import InputError, JobError
from lidit.sources import expand
from lidit.sources.ingest import IngestSummary, ingest
from lidit.sources.staging import stage_source
from lidit.sources.units import find_duplicates
from lidit.store import Corpus
from lidit.store.files.folder import Folder
from lidit.store.files.owner import MARK, owned
from lidit.store.verify import verify_corpus
from pipelines.corpus.ingest import run_ingest
from pipelines.runtime.tasks import in_tasks
from tests.helpers.command import lidit
from tests.helpers.pictures import bomb, encoded, picture, sample, write_tar
from tests.helpers.recorded_progress import RecordedProgress

pytestmark = pytest.mark.usefixtures("ray_cluster")
ROOT = Path(__file__).parents[3]
SETTINGS = IngestSettings(unit_samples=3, resolution=32, bucket_multiple=8)


def tree(folder: Path) -> dict[str, str]:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def reasons(corpus: Corpus) -> dict[str, str]:
    return {row["key"]: row["reason"] for table in corpus.quarantine() for row in table.to_pylist()}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Two tars: 5 and 3 good samples, 5 bad ones, one key in both files and one twice in the
    second.
    """
    folder = tmp_path / "source"
    folder.mkdir()
    first = [m for i in range(5) for m in sample(f"a{i}", f"caption {i % 2}", {"n": i}, seed=i)]
    bad = [
        ("broken.png", b"nothing"), ("broken.txt", b"x"),
        ("bomb.png", bomb()), ("bomb.txt", b"x"),
        ("empty.png", b""), ("empty.txt", b"x"),
        ("lonely.png", encoded(picture())),
        ("blind.txt", b"no image"),
    ]  # fmt: skip
    write_tar(folder / "0.tar", [*first, *bad])
    second = [m for key in ("b0", "a1", "b1", "b2") for m in sample(key, f"of {key}")]
    write_tar(folder / "1.tar", [*second, *sample("b0", "again")])
    return folder


def test_samples_captions_and_quarantine(source: Path, tmp_path: Path) -> None:
    progress = RecordedProgress()
    summary = run_ingest([str(source)], str(tmp_path / "c"), SETTINGS, progress)
    corpus = Corpus.open(tmp_path / "c")
    assert progress.calls == [(0, 2), (0, 2), (1, 2), (2, 2)]
    assert progress.notes[-1] == "5 refused"
    assert (corpus.num_samples, corpus.num_units) == (8, 3)
    assert corpus.units["samples"].to_pylist() == [3, 2, 3]
    assert corpus.units["source"].to_pylist() == ["0.tar", "0.tar", "1.tar"]
    keys = [key for unit in range(3) for key in corpus.samples(unit)["key"].to_pylist()]
    assert keys == ["a0", "a1", "a2", "a3", "a4", "b0", "b1", "b2"]
    assert corpus.captions(0)["text"].to_pylist() == ["caption 0", "caption 1"]
    row = corpus.samples(0).to_pylist()[1]
    assert row["captions"] == [{"index": 1, "origin": "original"}]
    assert (row["width"], row["height"], row["bucket"]) == (40, 30, "40x24")
    assert json.loads(row["meta"]) == {"n": 1}
    with Path(corpus.image_path(row["image"]["file"])).open("rb") as file:
        file.seek(row["image"]["offset"])
        assert file.read(row["image"]["size"]) == encoded(picture(seed=1))
    why = reasons(corpus)
    assert len(why) == 7
    for key, start in {
        "broken": "broken image", "bomb": "image too large", "empty": "broken image: zero bytes",
        "lonely": "no caption", "blind": "no image",
        "a1": "duplicate key: the first sample with it is in 0.tar",
        "b0": "duplicate key: the first sample with it is in 1.tar",
    }.items():  # fmt: skip
        assert why[key].startswith(start), key
    assert summary.samples + summary.refused == 15
    assert summary.reasons == {
        "broken image": 2, "duplicate key": 2, "image too large": 1, "no caption": 1, "no image": 1
    }  # fmt: skip
    assert sum(corpus.sources["samples"].to_pylist()) == 8
    assert sum(corpus.sources["refused"].to_pylist()) == 7
    assert not (tmp_path / "c" / "ingest").exists()


def test_rerun_does_nothing_and_other_sources_or_settings_are_refused(
    source: Path, tmp_path: Path
) -> None:
    corpus = str(tmp_path / "c")
    first = run_ingest([str(source)], corpus, SETTINGS)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "c").rglob("*")}
    again = run_ingest([str(source)], corpus, SETTINGS)
    assert again.skipped
    assert not first.skipped
    assert again.digest == first.digest
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "c").rglob("*")} == before
    with pytest.raises(InputError, match="unit_samples: 3 -> 4"):
        run_ingest([str(source)], corpus, SETTINGS.model_copy(update={"unit_samples": 4}))
    write_tar(source / "2.tar", sample("new"))
    with pytest.raises(InputError, match=r"source 2\.tar: new"):
        run_ingest([str(source)], corpus, SETTINGS)
    (source / "2.tar").unlink()
    (source / "1.tar").unlink()
    with pytest.raises(InputError, match=r"source 1\.tar: gone"):
        run_ingest([str(source)], corpus, SETTINGS)


def test_contents_do_not_depend_on_where_source_and_corpus_lie(
    source: Path, tmp_path: Path
) -> None:
    one = run_ingest([str(source)], str(tmp_path / "one"), SETTINGS)
    moved = tmp_path / "moved"
    source.rename(moved)
    other = run_ingest([f"{moved}/*.tar"], str(tmp_path / "other"), SETTINGS)
    assert one.digest == other.digest
    for group in ("samples", "captions", "quarantine"):
        assert tree(tmp_path / "one" / group) == tree(tmp_path / "other" / group)
    assert not Path(Corpus.open(tmp_path / "one").image_path("0.tar")).exists()
    found = run_ingest([str(moved)], str(tmp_path / "one"), SETTINGS)
    assert (found.skipped, found.moved_to, found.digest) == (True, str(moved), one.digest)
    assert Path(Corpus.open(tmp_path / "one").image_path("0.tar")).exists()
    assert verify_corpus(str(tmp_path / "one"), deep=True).sound
    assert run_ingest([str(moved)], str(tmp_path / "one"), SETTINGS).moved_to is None


@pytest.mark.parametrize("kind", ["tars", "pictures"])
def test_other_bytes_of_the_same_sizes_are_found_by_verify(
    source: Path, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    changed = source / "1.tar"
    if kind == "pictures":
        source = tmp_path / "pictures"
        source.mkdir()
        for seed in range(2):
            (source / f"{seed}.png").write_bytes(encoded(picture(seed=seed)))
            (source / f"{seed}.txt").write_text("a caption")
        changed = source / "1.png"
    run_ingest([str(source)], str(tmp_path / "c"), SETTINGS)
    assert lidit("verify", tmp_path / "c", "--sources") == 0
    content = bytearray(changed.read_bytes())
    content[len(content) // 2] ^= 1
    changed.write_bytes(content)
    assert lidit("verify", tmp_path / "c") == 0
    capsys.readouterr()
    assert lidit("verify", tmp_path / "c", "--sources") == 1
    told = capsys.readouterr()
    assert f"{changed if kind == 'tars' else source}: other contents than were ingested" in told.out
    assert "1 of " in told.err
    changed.unlink()
    assert lidit("verify", tmp_path / "c", "--sources") == 1


def test_interrupted_ingest_goes_on_where_it_was(source: Path, tmp_path: Path) -> None:
    run_ingest([str(source)], str(tmp_path / "whole"), SETTINGS)
    corpus = tmp_path / "c"

    # the state after a kill: the plan and one staged source stand, another was half written
    class StopError(Exception):
        pass

    def stop(done: int) -> None:
        if done == 1:
            raise StopError

    with pytest.raises(StopError):
        run_ingest([str(source)], str(corpus), SETTINGS, RecordedProgress(stop))
    staged = sorted((corpus / "ingest").glob("*.json"))
    with pytest.raises(InputError, match="not a corpus"):
        Corpus.open(corpus)
    (corpus / "ingest" / ".tmp-half").write_bytes(b"half")
    done = {p: p.stat().st_mtime_ns for p in staged if p.name != "plan.json"}

    def unchanged(_: int) -> None:
        assert {p: p.stat().st_mtime_ns for p in done} == done

    progress = RecordedProgress(unchanged)
    run_ingest([str(source)], str(corpus), SETTINGS, progress)
    assert progress.calls[0][0] >= 1, "counts what the first call has read"
    assert tree(corpus) == tree(tmp_path / "whole")


def test_one_process_writes_the_same_bytes_as_many_tasks(source: Path, tmp_path: Path) -> None:
    progress = RecordedProgress()
    summary = ingest([str(source)], str(tmp_path / "here"), SETTINGS, progress)
    assert progress.calls[-1] == (2, 2)
    tasks = run_ingest([str(source)], str(tmp_path / "tasks"), SETTINGS)
    assert tree(tmp_path / "here") == tree(tmp_path / "tasks")
    assert (summary.digest, summary.reasons) == (tasks.digest, tasks.reasons)
    assert ingest([str(source)], str(tmp_path / "tasks"), SETTINGS).skipped
    assert run_ingest([str(source)], str(tmp_path / "here"), SETTINGS).skipped


def test_source_that_changes_during_an_ingest_is_refused(source: Path, tmp_path: Path) -> None:
    def stop(done: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_ingest([str(source)], str(tmp_path / "c"), SETTINGS, RecordedProgress(stop))
    os.utime(source / "0.tar")
    with pytest.raises(InputError, match=r"0\.tar: has changed"):
        run_ingest([str(source)], str(tmp_path / "c"), SETTINGS)


def test_places_that_cannot_become_a_corpus(source: Path, tmp_path: Path) -> None:
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "thesis.tex").write_text("")
    with pytest.raises(InputError, match="not empty and not a corpus"):
        run_ingest([str(source)], str(tmp_path / "used"), SETTINGS)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a file"):
        run_ingest([str(source)], str(tmp_path / "file"), SETTINGS)
    with pytest.raises(InputError, match="inside the source"):
        run_ingest([str(source)], str(source / "corpus"), SETTINGS)
    assert [p.name for p in (tmp_path / "used").iterdir()] == ["thesis.tex"]


def test_source_without_a_usable_sample_is_an_error_that_says_why(tmp_path: Path) -> None:
    write_tar(tmp_path / "bad.tar", [("a.png", b"x"), ("a.txt", b"x"), ("b.png", b"x")])
    with pytest.raises(InputError, match=r"not one usable sample.*broken image.*was not made"):
        run_ingest([str(tmp_path / "bad.tar")], str(tmp_path / "c"), SETTINGS)
    write_tar(tmp_path / "empty.tar", [])
    with pytest.raises(InputError, match="not one usable sample"):
        run_ingest([str(tmp_path / "empty.tar")], str(tmp_path / "d"), SETTINGS)


def test_a_start_that_found_nothing_leaves_the_folder_to_the_corrected_command(
    tmp_path: Path,
) -> None:
    pq.write_table(pa.table({"prose": ["a cat", "a dog"]}), tmp_path / "texts.parquet")
    corpus = tmp_path / "c"
    with pytest.raises(InputError, match="not one usable sample"):
        run_ingest([str(tmp_path / "texts.parquet")], str(corpus), IngestSettings())
    assert not corpus.exists()
    corrected = IngestSettings(caption_fields={"prose": "original"})
    assert run_ingest([str(tmp_path / "texts.parquet")], str(corpus), corrected).samples == 2


def test_a_second_ingest_into_one_folder_is_refused_and_changes_nothing(
    source: Path, tmp_path: Path
) -> None:
    with owned(tmp_path / "c", "made"):
        with pytest.raises(InputError, match="c: is being made by process"):
            run_ingest([str(source)], str(tmp_path / "c"), SETTINGS)
        assert [path.name for path in (tmp_path / "c").iterdir()] == [MARK]
    assert run_ingest([str(source)], str(tmp_path / "c"), SETTINGS).samples > 0


def test_one_source_cut_in_half_does_not_stop_the_others(source: Path, tmp_path: Path) -> None:
    path = source / "0.tar"
    path.write_bytes(path.read_bytes()[:5000])
    summary = run_ingest([str(source)], str(tmp_path / "c"), SETTINGS)
    assert any(reason.startswith("archive cut off") for reason in summary.reasons)
    assert "b0" in Corpus.open(tmp_path / "c").samples(1)["key"].to_pylist()


def _captions(
    tmp_path: Path, lines: list[str], **settings: object
) -> tuple[list[str], IngestSummary]:
    path = tmp_path / "captions.jsonl"
    path.write_text("".join(json.dumps({"caption": line}) + "\n" for line in lines))
    folder = tmp_path / f"c{len(list(tmp_path.iterdir()))}"
    summary = run_ingest([str(path)], str(folder), SETTINGS.model_copy(update=settings))
    corpus = Corpus.open(folder)
    kept = [
        t for unit in range(corpus.num_units) for t in corpus.captions(unit)["text"].to_pylist()
    ]
    return kept, summary


def test_caption_filters(tmp_path: Path) -> None:
    lines = [
        "a good caption",
        "see https://example.com/x.jpg",
        "cat, red, cute, fluffy, animal, pet",
        "A red cat, a blue dog, a green bird, a grey fish, and a house.",
        "x" * 1_000_000,
        "nul \0 byte",
        "broken \ud800 surrogate",
        "   ",
        "  padded  ",
    ]
    kept, summary = _captions(
        tmp_path,
        lines,
        refuse_url_captions=True,
        refuse_tag_captions=True,
        max_caption_chars=1000,
        unit_samples=100,
    )
    assert kept == ["a good caption", lines[3], "padded"]
    assert summary.refused == 6
    assert set(summary.reasons) == {
        "caption with URL", "caption is a tag list", "caption too long", "invalid caption",
        "invalid UTF-8",
        "caption too short",
    }  # fmt: skip
    kept, summary = _captions(tmp_path, lines, max_caption_chars=2_000_000, unit_samples=100)
    assert len(kept) == 6
    assert max(map(len, kept)) == 1_000_000


def test_bad_caption_beside_a_good_one_is_refused_alone(tmp_path: Path) -> None:
    meta = {
        "captions": [
            {"text": "www.spam.com", "origin": "original"},
            {"text": "good", "origin": "synthetic"},
        ]
    }
    write_tar(tmp_path / "x.tar", [*sample("a", None, meta)])
    summary = run_ingest(
        [str(tmp_path / "x.tar")],
        str(tmp_path / "c"),
        SETTINGS.model_copy(update={"refuse_url_captions": True}),
    )
    corpus = Corpus.open(tmp_path / "c")
    assert (summary.samples, summary.refused, summary.refused_captions) == (1, 0, 1)
    assert corpus.samples(0)["captions"].to_pylist() == [[{"index": 0, "origin": "synthetic"}]]
    assert [t["what"].to_pylist() for t in corpus.quarantine()] == [["caption"]]


def test_image_filters_and_class_templates(tmp_path: Path) -> None:
    members = [
        *sample("low", meta={"aesthetic_score": 4.69}),
        *sample("high", meta={"aesthetic": "4.7"}),
        *sample("none", meta={}),
        ("small.png", encoded(picture(9, 50))), ("small.txt", b"x"), ("small.json",
                                                                      b'{"aesthetic": 9}'),
    ]  # fmt: skip
    write_tar(tmp_path / "x.tar", members)
    settings = SETTINGS.model_copy(update={"min_aesthetic": 4.7, "min_side": 10})
    run_ingest([str(tmp_path / "x.tar")], str(tmp_path / "c"), settings)
    corpus = Corpus.open(tmp_path / "c")
    assert corpus.samples(0)["key"].to_pylist() == ["high"]
    why = reasons(corpus)
    assert "4.69" in why["low"]
    assert "no aesthetic score" in why["none"]
    assert "9x50, min_side=10" in why["small"]

    names = tmp_path / "names.txt"
    names.write_text("n01440764 tench\nn01443537 goldfish\n")
    picture_members = [
        ("a.png", encoded(picture())),
        ("a.cls", b"n01443537"),
        ("b.png", encoded(picture())),
        ("b.cls", b"7"),
    ]
    write_tar(tmp_path / "imagenet.tar", picture_members)
    settings = SETTINGS.model_copy(
        update={"class_template": "a photo of {class}", "class_names": str(names)}
    )
    run_ingest([str(tmp_path / "imagenet.tar")], str(tmp_path / "d"), settings)
    corpus = Corpus.open(tmp_path / "d")
    assert corpus.captions(0)["text"].to_pylist() == ["a photo of goldfish"]
    assert "unknown class" in reasons(corpus)["b"]


def test_keys_that_start_anew_in_every_file(tmp_path: Path) -> None:
    for i in range(2):
        write_tar(tmp_path / f"{i}.tar", sample("000", f"of {i}"))
    source = [f"{tmp_path}/*.tar"]
    assert run_ingest(source, str(tmp_path / "c"), SETTINGS).reasons == {"duplicate key": 1}
    per_file = SETTINGS.model_copy(update={"unique_keys": "file"})
    assert run_ingest(source, str(tmp_path / "d"), per_file).samples == 2
    assert Corpus.open(tmp_path / "d").samples(1)["key"].to_pylist() == ["1.tar/000"]


def test_mixed_captions_and_images_are_refused(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", sample("a"))
    (tmp_path / "b.txt").write_text("only words\n")
    source = [f"{tmp_path}/a.tar", f"{tmp_path}/b.txt"]
    with pytest.raises(InputError, match=r"b\.txt: has captions without images"):
        run_ingest(source, str(tmp_path / "c"), SETTINGS)
    only = SETTINGS.model_copy(update={"captions_only": True})
    assert run_ingest(source, str(tmp_path / "d"), only).samples == 2
    assert Corpus.open(tmp_path / "d").samples(0)["image"].to_pylist() == [None]


@pytest.mark.parametrize("at_once", [1, 2, 5, 1000])
def test_duplicates_are_found_in_any_number_of_passes(tmp_path: Path, at_once: int) -> None:
    keys = [["a", "b", "c", "a"], ["d", "b", "e"], ["a", "f"]]
    for i, names in enumerate(keys):
        (tmp_path / f"{i}.jsonl").write_text(
            "".join(json.dumps({"key": k, "caption": "x"}) + "\n" for k in names)
        )
    folder = Folder.at(tmp_path / "staging")
    folder.create()
    _, files, *_ = expand([f"{tmp_path}/*.jsonl"])
    staged = [stage_source(folder, file, i, SETTINGS) for i, file in enumerate(files)]
    found = find_duplicates(folder, staged, at_once)
    assert found == {0: {3: "0.jsonl"}, 1: {1: "0.jsonl"}, 2: {0: "0.jsonl"}}


def test_a_worker_that_dies_each_time_gives_its_refusal_and_the_others_go_on() -> None:
    def square(number: int) -> int:
        if number == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return number * number

    calls = [(str(number), (number,)) for number in range(5)]
    assert sorted(in_tasks(square, calls, lambda number: -number)) == [-3, 0, 1, 4, 16]
    with pytest.raises(JobError, match=r"^3: the process reading it died three times"):
        list(in_tasks(square, calls[3:4]))


ALONE = """
import sys
from lidit.config import IngestSettings
from pipelines.corpus.ingest import run_ingest
print(run_ingest([sys.argv[1]], sys.argv[2], IngestSettings()).digest)
assert "ray" not in sys.modules
"""


def test_a_file_of_captions_is_ingested_without_ray_to_the_same_corpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    (tmp_path / "captions.txt").write_text("a red circle\na blue square\n")
    sources = [str(tmp_path / "captions.txt")]
    command = [sys.executable, "-c", ALONE, *sources, str(tmp_path / "alone")]
    alone = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    assert run_ingest(sources, str(tmp_path / "c"), IngestSettings()).digest == alone.stdout.strip()
    assert tree(tmp_path / "c") == tree(tmp_path / "alone")
