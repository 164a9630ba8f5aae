"""Arrow files whose offsets lie: refused before a value is touched, and where that fails nothing
but a reader dies."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from lidit.config import IngestSettings
from lidit.errors import InputError, JobError
from lidit.sources.apart import ReaderDiedError, call_apart
from lidit.sources.changes import compare_sources
from lidit.sources.ingest import ingest
from lidit.store import Corpus
from tests.helpers.source_reading import read

SETTINGS = IngestSettings(resolution=32, bucket_multiple=8)
TEXTS = ["red fox", "blue sky", "sea", "grass"]


def ipc(path: Path, table: pa.Table, stream: bool = False) -> Path:
    with (pa.ipc.new_stream if stream else pa.ipc.new_file)(str(path), table.schema) as writer:
        writer.write_table(table)
    return path


def with_offsets(path: Path, offsets: list[int], wrong: list[int], stream: bool = False) -> Path:
    """The file of a table, the offsets of its captions replaced."""
    ipc(path, pa.table({"key": list("abcd"), "caption": TEXTS}), stream)
    content = path.read_bytes()
    old, new = (np.array(values, np.int32).tobytes() for values in (offsets, wrong))
    assert content.count(old) == 1
    path.write_bytes(content.replace(old, new))
    return path


OFFSETS = [0, 7, 15, 18, 23]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "wrong",
    [[0, 7, 15, 18, 2**30], [0, -70000, 15, 18, 23], [0, 15, 7, 18, 23], [0, 7, 15, 18, 40]],
)
def test_offsets_out_of_their_buffer_are_one_refusal(
    tmp_path: Path, wrong: list[int], stream: bool
) -> None:
    samples, refused = read(with_offsets(tmp_path / "x.arrow", OFFSETS, wrong, stream))
    assert not samples
    assert [(r.what, r.reason.partition(":")[0]) for r in refused] == [("file", "broken table")]
    assert "Offset invariant failure" in refused[0].reason or "Length spanned" in refused[0].reason


def test_one_text_that_is_no_utf8_costs_its_row_alone(tmp_path: Path) -> None:
    path = ipc(
        tmp_path / "x.arrow",
        pa.table({"caption": TEXTS, "nested": [{"name": text} for text in TEXTS]}),
    )
    path.write_bytes(path.read_bytes().replace(b"blue sky", b"blue \xff\xff\xff"))
    samples, refused = read(path)
    assert [s.captions[0][0] for s in samples] == ["red fox", "sea", "grass"]
    assert [r.key for r in refused] == ["x.arrow:1"]


def test_sources_beside_a_hostile_one_are_ingested(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    with_offsets(data / "a.arrow", OFFSETS, [0, 7, 15, 18, 2**30])
    ipc(data / "b.feather", pa.table({"caption": TEXTS}))
    made = ingest([str(data)], str(tmp_path / "c"), SETTINGS)
    assert (made.samples, made.reasons) == (4, {"broken table": 1})


def test_a_source_that_ends_its_reader_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reading process runs with a module beside our own that lets the file's first bytes end
    it."""
    data = tmp_path / "data"
    data.mkdir()
    ipc(data / "a.arrow", pa.table({"caption": TEXTS}))
    ipc(data / "kills.arrow", pa.table({"caption": TEXTS}))
    (tmp_path / "sitecustomize.py").write_text(
        "import builtins, os, signal\n"
        "whole = builtins.open\n"
        "def opened(path, *rest, **more):\n"
        "    if str(path).endswith('kills.arrow'):\n"
        "        os.kill(os.getpid(), signal.SIGSEGV)\n"
        "    return whole(path, *rest, **more)\n"
        "builtins.open = opened\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    made = ingest([str(data)], str(tmp_path / "c"), SETTINGS)
    assert (made.samples, made.reasons) == (4, {"reader died": 1})
    corpus = Corpus.open(tmp_path / "c")
    (quarantine,) = corpus.quarantine()
    assert quarantine["reason"].to_pylist() == [
        "reader died: SIGSEGV while reading kills.arrow; write this file anew"
    ]
    assert [problem for _, problem in compare_sources(corpus)] == [None, None]


def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> str:
    (tmp_path / "called.py").write_text(
        "import os, signal\nfrom lidit.errors import InputError\nfrom lidit.sources.apart "
        "import serve\n"
        f"def main():\n    serve(work)\ndef work(arguments):\n    {body}\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    return "called"


def test_a_call_gives_its_arguments_and_its_errors_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = module(tmp_path, monkeypatch, "raise InputError(f\"not {arguments['what']}\")")
    with pytest.raises(InputError, match=r"^not ü$"):
        call_apart(name, {"what": "ü"}, "x")


def test_a_signal_of_the_bytes_is_told_from_one_of_the_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = module(tmp_path, monkeypatch, "os.kill(os.getpid(), arguments['signal'])")
    with pytest.raises(ReaderDiedError, match="SIGBUS"):
        call_apart(name, {"signal": signal.SIGBUS}, "x.arrow")
    with pytest.raises(JobError, match=r"x\.arrow: the process reading it ended \(SIGKILL\)"):
        call_apart(name, {"signal": signal.SIGKILL}, "x.arrow")


@pytest.mark.timeout(60)
def test_a_reader_ends_with_the_process_that_asked_for_it(tmp_path: Path) -> None:
    (tmp_path / "called.py").write_text(
        "import threading\nfrom lidit.sources.apart import serve\n"
        "def main():\n    serve(lambda arguments: threading.Event().wait())\n"
    )
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(tmp_path), *filter(None, sys.path)]),
    }
    code = "import called; called.main()"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, env=environment
    ) as reader:
        assert reader.stdin is not None
        reader.stdin.write(json.dumps({}).encode() + b"\n")
        reader.stdin.close()
        assert reader.wait() == 1
