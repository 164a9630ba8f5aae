"""The publish protocol: a family is whole or visibly unfinished, whatever dies and however many
write.
"""

import hashlib
import json
import multiprocessing
import os
import resource
import signal
import sys
import uuid
from pathlib import Path

import pyarrow as pa
import pytest
import torch

from lidit.errors import InputError, JobError
from lidit.store import CRASH_POINTS, Corpus, FamilyWriter, shared_table, text_table
from lidit.store.files.atomic import TEMPORARY_PREFIX, publish_table, published
from lidit.store.states import decode_table
from tests.helpers import family_job
from tests.helpers.corpus_factory import WORDS, make_corpus

UNITS = [WORDS, ("one",), (), ("two tokens", "", "a red circle")]


def _job(corpus: str, storage: str, crash: str | None, report: object) -> None:
    if crash:
        os.environ["LIDIT_CRASH_AT"] = crash
    report.put(family_job.run(corpus, storage))  # type: ignore[attr-defined]


def start(
    corpus: Path, storage: str = "int8", crash: str | None = None
) -> tuple[int | None, list[int]]:
    """Run the job in a process of its own: its exit code, and the units it computed."""
    context = multiprocessing.get_context("fork")
    report = context.Queue()
    process = context.Process(target=_job, args=(str(corpus), storage, crash, report))
    process.start()
    process.join()
    return process.exitcode, report.get() if process.exitcode == 0 else []


def contents(folder: Path) -> dict[str, str]:
    """Names and hashes of everything but the JSON files, whose seconds differ."""
    files = [
        p
        for p in folder.rglob("*")
        if p.is_file() and p.suffix != ".json" and not p.name.startswith("MANIFEST-")
    ]
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    make_corpus(tmp_path / "corpus", UNITS)
    return tmp_path / "corpus"


@pytest.mark.parametrize("storage", ["float32", "bfloat16", "int8", "int4", "coded"])
def test_reader_returns_what_was_published(corpus: Path, storage: str) -> None:
    family_job.run(str(corpus), storage)
    family = Corpus.open(corpus).text_family("fake")
    shared = family.shared()
    for unit, captions in enumerate(UNITS):
        expected = [family_job.states_of(c) for c in dict.fromkeys(captions)]
        states = family.read(unit)
        assert [len(s) for s in states] == [len(ids) for ids, _ in expected] == family.lengths(unit)
        assert family.token_ids(unit) == [ids for ids, _ in expected]
        for state, (_, original) in zip(states, expected):
            assert state.dtype == (torch.bfloat16 if storage == "bfloat16" else torch.float32)
            difference = (state.float() - original) / shared.deviation
            if storage == "float32":
                assert torch.equal(state, original)
            elif storage == "bfloat16":
                assert torch.equal(state, original.bfloat16())
            elif len(state):
                assert (
                    difference.square().mean().sqrt()
                    < {"int8": 0.02, "int4": 0.2, "coded": 0.2}[storage]
                )
    rows = [3, 0, 3]
    # Alone or with others: a product's last bits may depend on how many rows it has.
    for a, b in zip(family.read(0, rows), [family.read(0)[r] for r in rows]):
        assert torch.allclose(a, b, rtol=1e-5) if storage == "coded" else torch.equal(a, b)
    with pytest.raises(IndexError):
        family.read(0, [6])
    assert family.width == family_job.WIDTH
    assert family.records["rows"].to_pylist() == [6, 1, 0, 3]


def test_manifest_states_totals_and_measured_error(corpus: Path) -> None:
    family_job.run(str(corpus), "int8")
    manifest = Corpus.open(corpus).text_family("fake").manifest
    captions = [c for unit in UNITS for c in unit]
    states = torch.cat([family_job.states_of(c)[1] for c in captions])
    assert manifest["tokens"] == len(states)
    assert manifest["rows"] == len(captions)
    assert manifest["maximum"] == pytest.approx(states.max().item())
    assert manifest["minimum"] == pytest.approx(states.min().item())
    assert 0.001 < manifest["storage_error"]["standardised_rms"] < 0.02
    assert manifest["storage_error"]["centred_cosine"] > 0.999
    assert manifest["counts"] == {"truncated": 0}


def test_float_states_are_views_of_the_map_and_writing_them_leaves_the_file(corpus: Path) -> None:
    family_job.run(str(corpus), "bfloat16")
    family = Corpus.open(corpus).text_family("fake")
    before = contents(corpus)
    first, again = family.read(0, [1])[0], family.read(0, [1])[0]
    assert first.data_ptr() == again.data_ptr()
    first.zero_()
    assert contents(corpus) == before
    assert not torch.equal(first, Corpus.open(corpus).text_family("fake").read(0, [1])[0])


def test_plain_pyarrow_reads_a_shard(corpus: Path) -> None:
    family_job.run(str(corpus), "float32")
    path = next(corpus.glob("text/*/00000-*.arrow"))
    table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
    table.validate(full=True)
    facts = json.loads(table.schema.metadata[b"lidit"])
    states = torch.tensor(table["states"][1].as_py()).view(-1, facts["width"])
    assert torch.equal(states, family_job.states_of(WORDS[1])[1])


def test_pieces_of_a_unit_become_batches_and_read_the_same(corpus: Path) -> None:
    whole = family_job.open_writer(str(corpus), "float32")
    whole.write_shared(family_job.shared())
    rows = [family_job.states_of(c) for c in WORDS]
    pieces = FamilyWriter.open_or_create(str(corpus), "text", "pieces", {"x": 1})
    pieces.write_shared(family_job.shared())
    tables = [text_table([ids], [states], "float32", family_job.WIDTH) for ids, states in rows]
    for unit, captions in enumerate(UNITS):
        if unit == 0:
            pieces.publish(0, iter(tables))
        else:
            data = [family_job.states_of(c) for c in captions]
            pieces.publish(
                unit,
                text_table([i for i, _ in data], [s for _, s in data], "float32", family_job.WIDTH),
            )
    pieces.finish()
    family = Corpus.open(corpus).text_family("pieces")
    for row, (ids, states) in enumerate(rows):
        assert torch.equal(family.read(0, [row])[0], states)
        assert torch.equal(family.read(0)[row], states)
        assert family.token_ids(0, [row]) == [ids]


@pytest.mark.parametrize("point", CRASH_POINTS)
def test_kill_at_every_point_loses_at_most_the_unit_in_flight(tmp_path: Path, point: str) -> None:
    make_corpus(tmp_path / "undisturbed", UNITS)
    family_job.run(str(tmp_path / "undisturbed"), "int8")
    corpus = tmp_path / "killed"
    make_corpus(corpus, UNITS)
    once = point in ("family-created", "shared-written", "table-published", "manifest-published")
    exit_code, _ = start(corpus, crash=point if once else f"{point}:2")
    assert exit_code == -signal.SIGKILL
    if point != "manifest-published":
        with pytest.raises(InputError, match="incomplete"):
            Corpus.open(corpus).text_family("fake")
    finished = {p.name: p.stat().st_mtime_ns for p in corpus.glob("text/*/0*.json")}
    exit_code, recomputed = start(corpus)
    assert exit_code == 0
    assert recomputed == [u for u in range(len(UNITS)) if f"{u:05d}.json" not in finished]
    for name, written in finished.items():
        assert next(corpus.glob(f"text/*/{name}")).stat().st_mtime_ns == written
    assert contents(corpus) == contents(tmp_path / "undisturbed")
    one, other = (Corpus.open(tmp_path / n).text_family("fake") for n in ("killed", "undisturbed"))
    assert one.digest == other.digest
    assert not list(corpus.rglob(f"{TEMPORARY_PREFIX}*"))


def test_unknown_crash_point_is_refused(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIDIT_CRASH_AT", "data-witten")
    with pytest.raises(InputError, match="no such point"):
        family_job.run(str(corpus), "int8")


def test_complete_rerun_computes_and_changes_nothing(corpus: Path) -> None:
    family_job.run(str(corpus), "int8")
    before = {p: p.stat().st_mtime_ns for p in corpus.rglob("*") if p.is_file()}
    assert family_job.run(str(corpus), "int8") == []
    assert family_job.open_writer(str(corpus), "int8").complete()
    assert {p: p.stat().st_mtime_ns for p in corpus.rglob("*") if p.is_file()} == before


def test_two_writers_of_different_bits_leave_the_first_record_and_its_data(corpus: Path) -> None:
    first, second = (family_job.open_writer(str(corpus), "float32") for _ in range(2))
    first.write_shared(family_job.shared())
    rows = [family_job.states_of(c) for c in WORDS]
    ids = [i for i, _ in rows]
    one = text_table(ids, [s for _, s in rows], "float32")
    two = text_table(ids, [s + 1 for _, s in rows], "float32")
    stands = first.publish(0, one)
    assert second.publish(0, two) == stands
    assert [p.name for p in first.folder.path.glob("00000-*.arrow")] == [stands.file]


def test_units_made_with_shared_states_that_were_replaced_are_computed_again(corpus: Path) -> None:
    """As on an object store, where the later of two first writers stands."""
    early = family_job.open_writer(str(corpus), "float32")
    made_with = early.write_shared(family_job.shared()).sha256
    one, width = torch.randn(1, family_job.WIDTH), family_job.WIDTH
    publish_table(
        early.folder,
        "shared.arrow",
        shared_table([1], one, [2], one, torch.zeros(width), torch.ones(width)),
    )
    rows = [family_job.states_of(c) for c in WORDS]
    record = early.publish(0, text_table([i for i, _ in rows], [s for _, s in rows], "float32"))
    assert record.shared == made_with
    assert 0 in family_job.open_writer(str(corpus), "float32").pending()
    assert 0 in early.pending()


def _race(corpus: str, seed: int, barrier: object) -> None:
    torch.manual_seed(seed)
    writer = family_job.open_writer(corpus, "float32")
    mean, deviation = torch.randn(family_job.WIDTH), torch.rand(family_job.WIDTH) + 1
    barrier.wait()  # type: ignore[attr-defined]
    writer.write_shared(
        shared_table([1], torch.randn(1, 24), [2], torch.randn(1, 24), mean, deviation)
    )
    for unit in writer.pending():
        captions = writer.corpus.captions(unit)["text"].to_pylist()
        # two GPUs whose bits differ
        states = [torch.randn(len(c), family_job.WIDTH) for c in captions]
        writer.publish(
            unit, text_table([[0] * len(c) for c in captions], states, "float32", family_job.WIDTH)
        )
    writer.finish()


def test_racing_writers_and_cleaners_never_leave_a_record_that_contradicts_its_data(
    corpus: Path,
) -> None:
    context = multiprocessing.get_context("fork")
    for attempt in range(3):
        target = str(corpus) + str(attempt)
        make_corpus(target, UNITS * 5)
        barrier = context.Barrier(3)
        racers = [context.Process(target=_race, args=(target, seed, barrier)) for seed in range(3)]
        for racer in racers:
            racer.start()
        for racer in racers:
            racer.join()
        assert [racer.exitcode for racer in racers] == [0, 0, 0]
        family = Corpus.open(target).text_family("fake")
        for unit in range(len(UNITS) * 5):
            family.verify_unit(unit)
        assert family_job.open_writer(target, "float32").pending() == []
        assert len(list(Path(target).glob("text/*/0*.arrow"))) == len(UNITS) * 5
        shared = {json.loads(p.read_bytes())["shared"] for p in Path(target).glob("text/*/0*.json")}
        assert shared == {family.shared().sha256}


def test_cleaning_spares_a_live_writer_and_removes_a_dead_ones_files(corpus: Path) -> None:
    writer = family_job.open_writer(str(corpus), "float32")
    writer.write_shared(family_job.shared())
    orphan = writer.folder.path / "00001-0123456789ab.arrow"
    orphan.write_bytes(b"left by a dead writer")
    stale = writer.folder.path / f"{TEMPORARY_PREFIX}dead"
    stale.write_bytes(b"half")
    with published(
        writer.folder, lambda s: f"00000-{s[:12]}.arrow", lambda sink: sink.write(b"alive")
    ) as file:
        family_job.open_writer(str(corpus), "float32").pending()
        assert (writer.folder.path / file.name).exists()
    assert not orphan.exists()
    assert not stale.exists()
    family_job.open_writer(str(corpus), "float32").pending()
    assert not (writer.folder.path / file.name).exists()


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "record"])
def test_damage_is_found_named_and_recomputed(corpus: Path, damage: str) -> None:
    family_job.run(str(corpus), "bfloat16")
    family = Corpus.open(corpus).text_family("fake")
    path = family.folder.path / family.record(0)["file"]
    original = path.read_bytes()
    if damage == "flip":
        middle = len(original) // 2
        path.write_bytes(original[:middle] + bytes([original[middle] ^ 1]) + original[middle + 1 :])
    elif damage == "truncate":
        path.write_bytes(original[:-100])
    elif damage == "remove":
        path.unlink()
    else:
        (family.folder.path / "00000.json").write_bytes(b'{"unit": 0, "fi')
    if damage != "record":
        with pytest.raises(InputError, match=path.name):
            Corpus.open(corpus).text_family("fake").verify_unit(0)
    if damage == "truncate":
        with pytest.raises(InputError, match=path.name):
            Corpus.open(corpus).text_family("fake").read(0)
    if damage != "flip":  # a flipped bit keeps its size: `verify` and `repair` find it
        assert family_job.open_writer(str(corpus), "bfloat16").pending() == [0]
        assert family_job.run(str(corpus), "bfloat16") == [0]
        assert path.read_bytes() == original
        Corpus.open(corpus).text_family("fake").verify_unit(0)


def _fill_disk(corpus: str, limit: int) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        family_job.run(corpus, "float32")
    except JobError as error:
        print(error)
        sys.exit(1)


def test_full_disk_is_one_clear_error_and_loses_nothing(
    corpus: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    writer = family_job.open_writer(str(corpus), "float32")
    writer.write_shared(family_job.shared())
    family_job.publish(writer, 1)
    process = multiprocessing.get_context("fork").Process(
        target=_fill_disk, args=(str(corpus), 4000)
    )
    process.start()
    process.join()
    assert process.exitcode == 1
    assert "free some space" in capfd.readouterr().out
    assert not list(corpus.rglob(f"{TEMPORARY_PREFIX}*"))
    assert 1 not in writer.pending()
    family_job.run(str(corpus), "float32")
    Corpus.open(corpus).text_family("fake").verify_unit(0)


def test_wrong_number_of_rows_is_never_committed(corpus: Path) -> None:
    writer = family_job.open_writer(str(corpus), "float32")
    with pytest.raises(JobError, match="unit 1 has 1 captions, but 0 rows"):
        writer.publish(1, text_table([], [], "float32", 24))
    assert 1 in writer.pending()
    assert not list(writer.folder.path.glob("00001*"))


def test_changed_spec_is_another_family_and_the_difference_is_told(corpus: Path) -> None:
    family_job.run(str(corpus), "int8")
    changed = FamilyWriter.open_or_create(
        str(corpus), "text", "fake", family_job.SPEC | {"storage": "int8", "layer": -2}
    )
    assert changed.pending() == [0, 1, 2, 3]
    assert list(changed.relatives().values()) == [["layer: -3 -> -2"]]
    opened = Corpus.open(corpus)
    assert [f.complete for f in opened.text_families()].count(True) == 1
    complete = opened.text_family("fake")
    assert complete.spec["layer"] == -3
    assert opened.text_family(complete.fingerprint).directory == complete.directory
    with pytest.raises(InputError, match="incomplete"):
        opened.text_family(changed.directory)
    family_job.run(str(corpus), "float32")
    with pytest.raises(InputError, match=r"ambiguous.*storage: "):
        opened.text_family("fake")
    with pytest.raises(InputError, match=r"no text family 'gemma'; there are: fake-"):
        opened.text_family("gemma")


def test_family_of_another_corpus_is_refused(corpus: Path, tmp_path: Path) -> None:
    family_job.run(str(corpus), "int8")
    other = make_corpus(tmp_path / "other", [("different",)])
    (corpus / "text").rename(tmp_path / "other" / "text")
    with pytest.raises(InputError, match="another corpus"):
        other.text_family("fake")
    with pytest.raises(InputError, match="made for something else"):
        family_job.run(str(tmp_path / "other"), "int8")


def test_corpus_is_named_when_it_is_none(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        Corpus.open(tmp_path / "absent")
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match="is not a corpus"):
        Corpus.open(tmp_path / "folder")
    (tmp_path / "folder" / "corpus.json").write_text("{")
    with pytest.raises(InputError, match="damaged"):
        Corpus.open(tmp_path / "folder")


def test_captions_are_distinct_within_a_unit_by_normal_form(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path / "c", [("caf\u00e9", "cafe\u0301", "tea")])
    captions = corpus.captions(0)
    assert captions["text"].to_pylist() == ["caf\u00e9", "tea"]
    assert captions["sha256"][0].as_py() == hashlib.sha256("caf\u00e9".encode()).digest()
    assert [[c["index"] for c in row] for row in corpus.samples(0)["captions"].to_pylist()] == [
        [0],
        [0],
        [1],
    ]


def test_memory_file_system_corpus_behaves_like_a_local_one(tmp_path: Path) -> None:
    url = f"memory://{uuid.uuid4().hex}/corpus"
    make_corpus(url, UNITS)
    family_job.run(url, "int8")
    assert family_job.run(url, "int8") == []
    make_corpus(tmp_path / "local", UNITS)
    family_job.run(str(tmp_path / "local"), "int8")
    remote, local = (
        Corpus.open(url).text_family("fake"),
        Corpus.open(tmp_path / "local").text_family("fake"),
    )
    assert remote.digest == local.digest
    for unit in range(len(UNITS)):
        remote.verify_unit(unit)
        assert all(torch.equal(a, b) for a, b in zip(remote.read(unit), local.read(unit)))


def test_decode_table_agrees_with_the_reader(corpus: Path) -> None:
    family_job.run(str(corpus), "int8")
    family = Corpus.open(corpus).text_family("fake")
    shared = family.shared()
    table = family.folder.read_table(family.record(0)["file"])
    for a, b in zip(decode_table(table, shared.mean, shared.deviation), family.read(0)):
        assert torch.equal(a, b)
