"""Picture sets as WebDataset tars, split so that no near copy of a training picture is held out."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lidit.datasets.base import LeftOut, Picture, PictureSet
from lidit.datasets.packages import fetch, read
from lidit.errors import InputError
from lidit.progress import SILENT, Progress

PARTS = ("train", "held_out")
RECORD_FILE = "picture-set.json"
PER_SHARD = 1000
PICTURE_SET_VERSION = 3  # raise when the same packages begin to give other tars


@dataclass(frozen=True)
class WrittenSet:
    """left_out: reason -> files. `skipped`: everything was there already."""

    folder: Path
    pictures: dict[str, int]
    left_out: dict[str, int]
    skipped: bool


def write_picture_set(
    chosen: PictureSet,
    out: Path,
    held_out: float = 0.1,
    packages: Path | None = None,
    progress: Progress = SILENT,
) -> WrittenSet:
    """Write OUT/train/*.tar, OUT/held_out/*.tar, OUT/ATTRIBUTION.md, OUT/licences/ and
    OUT/picture-set.json.

    held_out: share of the groups of near copies that is held out. packages: folder of archives
    fetched before; missing archives are downloaded into it. progress: counts packages.

    The folder appears with everything in it or not at all; the same call again writes the same
    bytes. Raises InputError where something cannot be fetched, or OUT holds something else.
    """
    identity = {
        "set": chosen.name,
        "code": PICTURE_SET_VERSION,
        "held_out": held_out,
        "packages": {str(package): package.sha256 for package in chosen.packages},
    }
    known = _known(out, identity)
    if known:
        return known
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as temporary:
        work = Path(temporary)
        # Fetch, check and unpack every package.
        files = {}
        progress.expect(len(chosen.packages))
        for number, package in enumerate(chosen.packages):
            progress.update(number, f"fetch and check {package}")
            archive = fetch(package, packages or work / "packages")
            files[package.name] = read(package, archive, chosen.wanted)
        progress.update(len(chosen.packages), "checked")

        # Take the pictures that have a caption.
        candidates = list(chosen.pictures(files))
        pictures = [one for one in candidates if isinstance(one, Picture)]
        left_out = dict(Counter(one.reason for one in candidates if isinstance(one, LeftOut)))
        if not pictures:
            raise InputError(
                f"{chosen.name}: its packages hold no picture with a caption: {left_out}"
            )

        # Write everything beside `out`, then move it there whole.
        made = work / "made"
        made.mkdir()
        counts, motifs = {}, _groups(pictures)
        for part, members in split(pictures, held_out).items():
            counts[part] = len(members)
            _write_tars(made / part, members, motifs)
        (made / "ATTRIBUTION.md").write_text(chosen.attribution, "utf-8")
        _write_licences(made / "licences", files)
        record = {**identity, "pictures": counts, "left_out": left_out}
        (made / RECORD_FILE).write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")
        if out.exists():
            out.rmdir()  # an empty folder, or _known would have refused it
        made.rename(out)
    return WrittenSet(out, counts, left_out, skipped=False)


def _known(out: Path, identity: dict[str, object]) -> WrittenSet | None:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    try:
        record = json.loads((out / RECORD_FILE).read_text("utf-8"))
        differing = sorted(key for key, value in identity.items() if record[key] != value)
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(
            f"{out}: not empty and not a picture set; name a new folder for --out"
        ) from None
    if differing:
        raise InputError(
            f"{out}: holds another picture set "
            f"({', '.join(f'{k}: {record[k]} there' for k in differing)}); "
            "name a new folder for --out or delete this one"
        )
    return WrittenSet(out, record["pictures"], record["left_out"], skipped=True)


def split(pictures: Sequence[Picture], held_out: float) -> dict[str, list[Picture]]:
    """Both parts, in order of key. Pictures tied to each other, also through others, are on one
    side.

    A group's side follows from its names alone, so more pictures of other things move none of
    these. Raises InputError where a part would be empty.
    """
    group = _groups(pictures)
    parts: dict[str, list[Picture]] = {part: [] for part in PARTS}
    for picture in sorted(pictures, key=lambda one: one.key):
        drawn = int.from_bytes(hashlib.sha256(group[picture.key].encode()).digest()[:8]) / 2**64
        parts["held_out" if drawn < held_out else "train"].append(picture)
    empty = [part for part in PARTS if not parts[part] and (held_out > 0 or part == "train")]
    if empty:
        raise InputError(
            f"held_out={held_out}: no picture would be in {empty[0]}; choose another share"
        )
    return {part: members for part, members in parts.items() if members}


def _groups(pictures: Iterable[Picture]) -> dict[str, str]:
    """Key -> the first tie, in order, of all pictures it is tied to."""
    parent: dict[str, str] = {}

    def root(tie: str) -> str:
        parent.setdefault(tie, tie)
        while parent[tie] != tie:
            parent[tie] = parent[parent[tie]]
            tie = parent[tie]
        return tie

    first: dict[str, str] = {}
    for picture in pictures:
        if picture.key in first:
            raise InputError(
                f"{picture.origin}: its key {picture.key} is taken; the package has changed"
            )
        # "~" sorts after words, so that a group is named by what it shows and not by a digest.
        ties = [*picture.ties, f"~{hashlib.sha256(picture.content).hexdigest()}"]
        first[picture.key] = ties[0]
        for tie in ties[1:]:
            low, high = sorted((root(ties[0]), root(tie)))
            parent[high] = low
    return {key: root(tie) for key, tie in first.items()}


def _write_tars(folder: Path, pictures: Sequence[Picture], motifs: Mapping[str, str]) -> None:
    folder.mkdir()
    # In the order of a digest: neighbours in the list are of one kind, and a unit should hold all
    # kinds.
    mixed = sorted(pictures, key=lambda one: hashlib.sha256(one.key.encode()).digest())
    for number, start in enumerate(range(0, len(mixed), PER_SHARD)):
        with tarfile.open(folder / f"{number:05}.tar", "w", format=tarfile.PAX_FORMAT) as tar:
            for picture in mixed[start : start + PER_SHARD]:
                plain, others = picture.captions[0][0], picture.captions[1:]
                record = {
                    **picture.meta,
                    "motif": motifs[picture.key],
                    "captions": [{"text": text, "origin": origin} for text, origin in others],
                    "source": picture.origin,
                    "licence": picture.licence,
                }
                _add(tar, f"{picture.key}.{picture.suffix}", picture.content)
                _add(tar, f"{picture.key}.txt", plain.encode())
                _add(
                    tar,
                    f"{picture.key}.json",
                    json.dumps(record, ensure_ascii=False, sort_keys=True).encode(),
                )


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def _write_licences(folder: Path, files: dict[str, dict[str, bytes]]) -> None:
    """The licence and read-me files of every package, unchanged."""
    folder.mkdir()
    for package, held in files.items():
        for name, content in held.items():
            last = name.rpartition("/")[2]
            if last in ("LICENSE", "README.md", "copyright"):
                target = folder / package.removeprefix("@").replace("/", "-")
                target.mkdir(parents=True, exist_ok=True)
                (target / last).write_bytes(content)
