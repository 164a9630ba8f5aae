"""Keys, audit, guard and verify-image, as an operator types them."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lidit.config import ModelSettings
from lidit.models import LIDiT
from lidit.pipeline import LIDiTPipeline
from lidit.serving.audit import AuditLog, Entry, load_key
from lidit.serving.guards.probe import Probe
from lidit.serving.keys import KeyDenied, KeyStore
from lidit.serving.provenance.certificates import make_certificates
from lidit.serving.provenance.issued import IssuedLog
from lidit.serving.provenance.manifest import ManifestSigner
from lidit.serving.provenance.watermark import Watermark
from tests.helpers.command import lidit
from tests.helpers.marked_pictures import encoded, photo, scene
from tests.helpers.tiny_encoders import WIDTH, tiny_encoders

Capture = pytest.CaptureFixture[str]


def told(capsys: Capture, *words: str | Path, code: int = 0) -> str:
    """What the command prints, to whichever stream, when it ends with this code."""
    assert lidit(*words) == code
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return captured.out + captured.err


def test_a_key_is_added_listed_and_revoked(tmp_path: Path, capsys: Capture) -> None:
    file = tmp_path / "new" / "keys.sqlite"
    shown = told(
        capsys,
        "keys",
        "add",
        "alice",
        "--file",
        file,
        "--quota",
        "1000",
        "--days",
        "1",
        "--scope",
        "verify",
    )
    (text,) = re.findall(r"^lidit_\w+$", shown, re.MULTILINE)
    store = KeyStore(file)
    key = store.check(text, "verify")
    assert (key.name, key.scopes, key.quota) == ("alice", {"verify"}, 1000)
    assert key.expires is not None
    store.charge(key.id, 10)
    listed = told(capsys, "keys", "list", "--file", file)
    assert text not in listed
    assert re.search(
        rf"{key.id}  alice  verify  until \d{{4}}.*  10 of 1,000 units in 1 days", listed
    )
    assert "revoked" in told(capsys, "keys", "revoke", key.id, "--file", file)
    with pytest.raises(KeyDenied):
        store.check(text, "verify")
    other = told(capsys, "keys", "add", "bob", "--file", file)
    (text,) = re.findall(r"^lidit_\w+$", other, re.MULTILINE)
    assert store.check(text, "generate").quota is None
    assert "never" in told(capsys, "keys", "list", "--file", file)
    told(capsys, "keys", "revoke", text, "--file", file)
    with pytest.raises(KeyDenied):
        store.check(text, "generate")


def test_mistakes_with_keys_are_one_line(tmp_path: Path, capsys: Capture) -> None:
    file = tmp_path / "keys.sqlite"
    assert "lidit keys add" in told(capsys, "keys", "list", "--file", file, code=2)
    assert not file.exists()
    told(capsys, "keys", "add", "alice", "--file", file)
    assert "scopes are generate" in told(
        capsys, "keys", "add", "a", "--scope", "root", "--file", file, code=2
    )
    assert "no key has the id" in told(
        capsys, "keys", "revoke", "0123456789", "--file", file, code=2
    )
    file.write_text("no database")
    assert "cannot be used" in told(capsys, "keys", "list", "--file", file, code=2)


def test_a_log_is_checked_and_its_first_bad_line_named(tmp_path: Path, capsys: Capture) -> None:
    file = tmp_path / "audit.jsonl"
    log = AuditLog(file, load_key(tmp_path / "key"))
    hashes = [log.append(Entry(event="accepted", seed=number)) for number in range(4)]
    log.close()
    assert told(capsys, "audit", file) == f"{file}: sound, 4 lines, head {hashes[-1]}\n"
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(lines[:3]))
    assert "sound, 3 lines" in told(capsys, "audit", file)
    assert "cut off or written anew" in told(capsys, "audit", file, "--head", hashes[-1], code=1)
    file.write_bytes(b"".join([lines[0], lines[1].replace(b":1", b":2"), *lines[2:]]))
    assert f"{file}: line 2: " in told(capsys, "audit", file, code=1)
    assert "cannot be read" in told(capsys, "audit", tmp_path / "absent", code=2)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder that reads prompts with a tiny LLM."""
    folder = tmp_path_factory.mktemp("model")
    encoders = tiny_encoders(folder)
    shape = {"width": 16, "depth": 1, "heads": 2, "patch_size": 4, "refiner": {"depth": 1}}
    network = LIDiT.from_settings(
        ModelSettings.model_validate(shape), dict.fromkeys(encoders, WIDTH), 3
    )
    pipeline = LIDiTPipeline(network, height=16, width=16)
    pipeline.encoders = encoders
    pipeline.save_pretrained(folder / "model")
    return folder / "model"


def test_a_guard_is_trained_and_its_rates_are_told(
    model: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LIDIT_CACHE", str(tmp_path / "cache"))
    labelled, out = tmp_path / "labelled.jsonl", tmp_path / "guard.safetensors"
    made = itertools.product(
        ("red", "blue", "green", "white"), ("circle", "star", "cube"), ("bomb", "gun"), range(2)
    )
    rows = [{"prompt": f"a {colour} {thing} and a {word if refuse else 'drawing'}{word[0]}",
             "refuse": bool(refuse)}
            for colour, thing, word, refuse in made]  # fmt: skip
    labelled.write_text("".join(json.dumps(row) + "\n" for row in rows))
    shown = told(
        capsys, "guard", "train", labelled, "--model", model, "--out", out, "--blocked", "0.05"
    )
    assert re.search(r"to be refused and refused:  \d+ of \d+, [\d.]+% \[[\d.]+%, [\d.]+%\]", shown)
    assert re.search(r"harmless and refused:       \d+ of \d+, [\d.]+% \[[\d.]+%, [\d.]+%\]", shown)
    assert re.search(r"\(AUC, 0\.5 is chance\): [01]\.\d{3}", shown)
    encoders = LIDiTPipeline.from_pretrained(model).encoders
    probe = Probe.load(out, {name: encoder.fingerprint for name, encoder in encoders.items()})
    assert f"threshold {probe.threshold:.3f}" in shown
    labelled.write_text("no JSON\n")
    assert "line 1: a line is" in told(capsys, "guard", "train", labelled, "--model", model, code=2)


def test_a_list_of_words_is_tried_on_prompts(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "words.txt").write_text("weapon\n")
    (tmp_path / "prompts.txt").write_text("a cat\na w3apon\nnew eapontree\na dog\n")
    shown = told(capsys, "guard", "words", tmp_path / "words.txt", tmp_path / "prompts.txt")
    assert shown == "refused: 1 of 4  2\nsuspected: 1 of 4  3\n"
    (tmp_path / "words.txt").write_text("")
    assert "the list is empty" in told(
        capsys, "guard", "words", tmp_path / "words.txt", tmp_path / "prompts.txt", code=2
    )


def test_a_picture_is_traced(tmp_path: Path, capsys: Capture) -> None:
    pytest.importorskip("c2pa")
    chain, key, roots = make_certificates(tmp_path, "Studio")
    secret = load_key(tmp_path / "watermark.key")
    image = Watermark(secret).embed(photo(256), 0xABCD)
    picture, _ = ManifestSigner.from_files(chain, key).sign(
        encoded(image), "image/png", "request-1", "0" * 64
    )
    IssuedLog(tmp_path / "issued.sqlite", create=True).add(picture, image, "request-1", 0xABCD)
    marks = (
        "--log",
        tmp_path / "issued.sqlite",
        "--watermark",
        tmp_path / "watermark.key",
        "--roots",
        roots,
    )
    (tmp_path / "own.png").write_bytes(picture)
    shown = told(capsys, "verify-image", tmp_path / "own.png", *marks)
    assert f"{tmp_path}/own.png: made here\n" in shown
    assert "manifest   whole, signed here, urn:c2pa:" in shown
    assert "watermark  0000abcd" in shown
    assert "log        request request-1, by these bytes" in shown
    assert "by a signer that is not known here" in told(
        capsys, "verify-image", tmp_path / "own.png", code=1
    )
    (tmp_path / "copy.jpg").write_bytes(encoded(image, "JPEG"))
    shown = told(capsys, "verify-image", tmp_path / "copy.jpg", *marks, code=1)
    assert "copy.jpg: altered" in shown
    assert "log        request request-1, by the watermark" in shown
    (tmp_path / "other.png").write_bytes(encoded(scene(256)))
    shown = told(capsys, "verify-image", tmp_path / "other.png", *marks, code=1)
    assert (
        "other.png: unknown\n  manifest   none\n  watermark  none\n  log        none of its "
        "pictures\n" in shown
    )
    (tmp_path / "text.png").write_text("text")
    assert "text.png: the file is no PNG" in told(
        capsys, "verify-image", tmp_path / "text.png", code=2
    )
    absent = told(
        capsys, "verify-image", tmp_path / "own.png", "--log", tmp_path / "absent.sqlite", code=2
    )
    assert "give the log by --log" in absent


def test_keys_load_no_torch() -> None:
    """An operator who revokes a key waits for no library; nor does a process that
    only checks keys.
    """
    code = (
        "import sys, lidit.serving.keys, lidit.serving.audit, jobs.keys; print('torch' in "
        "sys.modules)"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    assert done.stdout == "False\n"
