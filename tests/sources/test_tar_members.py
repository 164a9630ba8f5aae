"""Members of a tar that no sample is made of: what systems add, what stands apart, what a name
hides."""

import gzip
import io
import tarfile
from pathlib import Path

import pytest

from lidit.config import IngestSettings
from lidit.errors import InputError
from lidit.sources.ingest import ingest
from lidit.sources.reading import unit_images
from lidit.store import Corpus
from tests.helpers.pictures import Member, encoded, picture, sample, write_tar
from tests.helpers.source_reading import read, stage

SMALL = {"resolution": 32, "bucket_multiple": 8}


def test_members_that_systems_add_do_not_end_a_sample(tmp_path: Path) -> None:
    members: list[Member] = []
    for i in range(3):
        image, text = sample(f"./s{i}", f"caption {i}", seed=i)
        noise = [
            (f"./._s{i}.png", b"\0\5\x16\7"),
            (f"__MACOSX/._s{i}.txt", b"\0\5\x16\7"),
            ("./.DS_Store", b"x"),
        ]
        members += [noise[0], image, noise[1], noise[2], ("LICENSE", b"free"), text]
    (record,), samples, refused = stage(write_tar(tmp_path / "x.tar", members), **SMALL)
    assert [(s["key"], s["captions"][0]["text"]) for s in samples] == [
        (f"./s{i}", f"caption {i}") for i in range(3)
    ]
    assert not refused
    assert record.ignored == {
        "hidden ._*": 3,
        "hidden .DS_Store": 3,
        "no suffix": 3,
        "system __MACOSX/": 3,
    }


def test_members_of_one_key_that_stand_apart_are_named(tmp_path: Path) -> None:
    pairs = [sample(f"s{i}", f"caption {i}", seed=i) for i in range(3)]
    apart: list[Member] = [image for image, _ in pairs] + [text for _, text in pairs]
    members = [
        *sample("whole"),
        *apart,
        ("whole.json", b"{}"),
        ("lonely.png", encoded(picture())),
        ("blind.txt", b"x"),
    ]
    _, samples, refused = stage(write_tar(tmp_path / "x.tar", members), **SMALL)
    assert [s["key"] for s in samples] == ["whole"]
    reasons = {r["key"]: r["reason"] for r in refused}
    assert set(reasons) == {"s0", "s1", "s2", "whole", "lonely", "blind"}
    for key in ("s0", "s1", "s2", "whole"):
        assert reasons[key].startswith("not adjacent, use tar --sort=name: ")
    assert (
        reasons["lonely"] == "no caption: no text member, caption field or class label; found .png"
    )
    assert reasons["blind"] == "no image: no member or field holds one; found .txt"


def test_images_apart_from_their_texts_are_no_loss_where_only_captions_are_wanted(
    tmp_path: Path,
) -> None:
    pairs = [sample(f"s{i}", f"caption {i}") for i in range(2)]
    path = write_tar(tmp_path / "x.tar", [pairs[0][0], pairs[1][0], pairs[0][1], pairs[1][1]])
    samples, refused = read(path, captions_only=True)
    assert [s.captions[0][0] for s in samples] == ["caption 0", "caption 1"]
    assert not refused


def test_a_second_dot_is_named(tmp_path: Path) -> None:
    dotted: list[Member] = [(f"clip.{i:03d}.{s}", b"x") for i in range(3) for s in ("jpg", "txt")]
    masks: list[Member] = [*sample("a"), ("a.mask.png", b"x")]
    (record,), samples, _ = stage(write_tar(tmp_path / "x.tar", [*masks, *dotted]), **SMALL)
    assert [s["key"] for s in samples] == ["a"]
    dot = "behind a second dot in its name"
    assert record.ignored == {f".png {dot}": 1, f".jpg {dot}": 3, f".txt {dot}": 3}
    write_tar(tmp_path / "y.tar", dotted)
    with pytest.raises(
        InputError, match=r"not one usable sample \(left out 3 x \.jpg behind a second dot"
    ):
        ingest([str(tmp_path / "y.tar")], str(tmp_path / "c"), IngestSettings(**SMALL))


def test_what_was_there_instead_of_an_image_or_a_caption(tmp_path: Path) -> None:
    members = [
        ("a.heic", b"x"), ("a.txt", b"a caption"),
        ("b.png", encoded(picture())), ("b.json", b'{"prompt": "words", "width": 3}'),
        ("c.png", encoded(picture())), ("c.json", b'{"caption": 7}'),
        ("d.png", encoded(picture())), ("d.cls", b"cat"),
    ]  # fmt: skip
    _, _, refused = stage(write_tar(tmp_path / "x.tar", members), **SMALL)
    found = {r["key"]: r["reason"].partition("; found ")[2] for r in refused}
    assert found == {
        "a": ".heic, .txt",
        "b": ".png, .json, fields prompt, width",
        "c": ".png, .json, fields caption; caption is no text but int",
        "d": ".png, .cls; class_template makes a caption of the class label 'cat'",
    }


def test_captions_of_another_suffix(tmp_path: Path) -> None:
    members = [
        ("a.jfif", encoded(picture(), "JPEG")),
        ("a.caption", b"second"),
        ("a.TXT", b"first"),
    ]
    samples, refused = read(write_tar(tmp_path / "x.tar", members))
    assert not refused
    assert [text for text, _ in samples[0].captions] == ["first", "second"]


@pytest.mark.parametrize("name", ["x.tar", "x.tar.gz"])
def test_whether_a_tar_is_gzipped_is_seen_by_its_bytes(tmp_path: Path, name: str) -> None:
    members = [m for i in range(3) for m in sample(f"s{i}", f"caption {i}", seed=i)]
    path = write_tar(tmp_path / name, members, "w:gz" if name == "x.tar" else "w")
    ingest([str(path)], str(tmp_path / "c"), IngestSettings(**SMALL))
    corpus = Corpus.open(tmp_path / "c")
    assert list(unit_images(corpus, 0)) == [encoded(picture(seed=i)) for i in range(3)]


@pytest.mark.parametrize(
    ("magic", "kind"), [(b"\xfd7zXZ\0", "xz"), (b"BZh91AY", "bzip2"), (b"PK\3\4", "zip")]
)
def test_other_packers_are_named(tmp_path: Path, magic: bytes, kind: str) -> None:
    (tmp_path / "x.tar").write_bytes(magic + bytes(600))
    (refusal,) = read(tmp_path / "x.tar")[1]
    assert refusal.reason == f"not a tar but {kind}: unpack it, and pack it again as a tar"


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".csv"])
def test_a_packed_text_file_gives_no_captions(tmp_path: Path, suffix: str) -> None:
    (tmp_path / f"x{suffix}").write_bytes(gzip.compress(b"caption\n" * 5000, 0))
    samples, refused = read(tmp_path / f"x{suffix}")
    assert not samples
    assert [r.reason for r in refused] == [
        f"not a text file: x{suffix} is gzip inside; unpack it, or give it the suffix of its kind"
    ]


def test_a_name_in_a_refusal_is_no_kind_of_its_own(tmp_path: Path) -> None:
    for name in ("one", "two"):
        whole = write_tar(tmp_path / f"{name}.tar", [*sample(f"{name}-a"), *sample(f"{name}-b")])
        with tarfile.open(whole) as archive:
            whole.write_bytes(whole.read_bytes()[: archive.getmembers()[-1].offset + 100])
    made = ingest([str(tmp_path / "*.tar")], str(tmp_path / "c"), IngestSettings(**SMALL))
    assert made.reasons == {"archive cut off": 4}


def test_what_a_terminal_obeys_is_written_out(tmp_path: Path) -> None:
    name = "a\x1b[31m\u202e"
    members = [
        (f"{name}.png", b"x"),
        (f"{name}.jpg", b"x"),
        ("b.\x1b]0;title\x07", b"x"),
        *sample("c"),
    ]
    (record,), _, refused = stage(write_tar(tmp_path / "x.tar", members), **SMALL)
    assert record.ignored == {r".\x1b]0;title\x07": 1}
    assert [r["reason"] for r in refused] == [r"two images: .jpg beside a\x1b[31m\u202e.png"]


def test_a_long_tar_of_halves_is_told_in_bounded_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lidit.sources.webdataset_tar._MAX_HELD", 5)
    images = [(f"s{i:03d}.png", b"x") for i in range(20)]
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        for name, data in images:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    (tmp_path / "x.tar").write_bytes(content.getvalue())
    samples, refused = read(tmp_path / "x.tar")
    assert len(samples) == 20  # without captions: the checks refuse them
    assert not refused
