"""Image files of official suites: where each image goes, which files are missing, and writing a
file whole.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lidit.errors import InputError
from lidit.evals.records import read_record
from lidit.store.files.atomic import TEMPORARY_PREFIX, publish_bytes
from lidit.store.files.folder import Folder

FIRST_SEED = 42  # the seed of each prompt's first image in the reference samplers
IDENTITY_FILE = "suite.json"
IMAGES = "images"  # the identity file's key for how many files the prompt list asks for
# without this end a file was cut: full disk, lost machine, stopped copy
PNG_END = b"\0\0\0\0IEND\xaeB`\x82"


@dataclass(frozen=True)
class ImageTarget:
    """One file a scorer reads: `path` relative to the output folder, drawn once per seed, `columns`
    to a row.
    """

    path: Path
    prompt: str
    seeds: tuple[int, ...]
    columns: int = 1


def missing(out: Path, targets: Iterable[ImageTarget]) -> list[ImageTarget]:
    """The targets whose file is missing or cut, in order. Workers take
    `missing(...)[worker::workers]`.
    """
    return [target for target in targets if not _is_whole(out / target.path)]


def _is_whole(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            file.seek(-len(PNG_END), io.SEEK_END)
            return file.read() == PNG_END
    except OSError:  # not there, or shorter than the end
        return False


def save_target(out: Path, target: ImageTarget, images: Sequence[NDArray[np.uint8]]) -> None:
    """Writes the target's images, uint8 [H, W, 3] in the order of its seeds, as one PNG: whole or
    not at all.

    Several images become a grid, row by row. Raises InputError for another number of images or
    unequal sizes.
    """
    shapes = {image.shape for image in images}
    if (
        len(images) != len(target.seeds)
        or len(shapes) != 1
        or any(image.dtype != np.uint8 for image in images)
    ):
        raise InputError(
            f"{target.path}: needs {len(target.seeds)} uint8 images of one size, got "
            f"{len(images)} of {sorted(shapes)}"
        )
    rows = [
        np.concatenate(images[i : i + target.columns], axis=1)
        for i in range(0, len(images), target.columns)
    ]
    buffer = io.BytesIO()
    Image.fromarray(np.concatenate(rows, axis=0)).save(buffer, format="PNG")
    write_whole(out, target.path, buffer.getvalue())


def write_whole(out: Path, path: Path, content: bytes) -> None:
    """Writes `out / path` so that a file that exists is complete, whatever is killed or loses
    power.

    The temporary file lies in `out` itself: scorers list the folders below it and would trip over a
    leftover there.
    """
    (out / path).parent.mkdir(parents=True, exist_ok=True)
    publish_bytes(Folder.at(out), str(path), content)


def claim_folder(out: Path, identity: Mapping[str, object], images: int) -> None:
    """Mark the output folder as belonging to one suite, prompt list and model, or refuse a folder
    of others.

    `identity`: JSON values such as the suite's name, the prompt file's and the model's digests,
    sampler and seed.
    `images`: how many files the prompt list asks for, see `recorded_images`. Raises InputError for
    a folder of anything else.
    """
    expected = json.loads(json.dumps({**identity, IMAGES: images}, sort_keys=True))
    recorded = _identity(out)
    if recorded is not None:
        # A folder begun before the number of images was recorded is still the same folder.
        earlier = {IMAGES: images} | recorded
        different = sorted(
            key for key in {*expected, *earlier} if expected.get(key) != earlier.get(key)
        )
        if different:
            raise InputError(
                f"{out}: holds images made with other {', '.join(different)}; give a new folder"
            )
    elif out.is_dir() and any(not path.name.startswith(TEMPORARY_PREFIX) for path in out.iterdir()):
        raise InputError(f"{out}: not empty and without {IDENTITY_FILE}; give a new folder")
    if recorded != expected:
        write_whole(out, Path(IDENTITY_FILE), json.dumps(expected, indent=1).encode())


def recorded_images(out: Path) -> int | None:
    """How many files `out` was claimed for; None without a record. Raises InputError for an
    unreadable record.
    """
    images = (_identity(out) or {}).get(IMAGES)
    return images if isinstance(images, int) else None


def check_drawn(folders: Iterable[Path], suite: str, model: str) -> dict[str, Any]:
    """The record of the first of `folders` that has a record of its images; empty if none has.

    suite, model: whose results are to be filed; `model` is the digest of its weights. Raises
    InputError where a folder holds images of another suite or of other weights: their scores would
    be filed under this model.
    """
    known: dict[str, Any] = {}
    for folder in folders:
        recorded = _identity(folder) or {}
        for key, expected in (("suite", suite), ("model", model)):
            if recorded.get(key, expected) != expected:
                raise InputError(
                    f"{folder / IDENTITY_FILE}: the images were drawn with {key} "
                    f"{str(recorded[key])[:12]}, not "
                    f"{expected[:12]}; give the model they were drawn with, or --out of its "
                    "evaluation"
                )
        known = known or recorded
    return known


def _identity(out: Path) -> dict[str, Any] | None:
    path = out / IDENTITY_FILE
    if not path.is_file():
        return None
    try:
        recorded = read_record(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        recorded = None
    if not isinstance(recorded, dict):
        raise InputError(f"{path}: not readable; delete {out} or give a new folder")
    return recorded


def read_lines(path: Path) -> list[str]:
    """The lines of a UTF-8 text file without their ends. Raises InputError where it cannot be read
    or has none.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from None
    # not splitlines(): a prompt may hold a form feed or a Unicode line separator
    lines = text.split("\n")
    while lines and not lines[-1].strip():
        lines.pop()
    if not lines:
        raise InputError(f"{path}: empty")
    return [line.removesuffix("\r") for line in lines]
