"""What the exporters of official suites share: which image goes where, what is missing, and writing it whole."""

from __future__ import annotations

import io
import json
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lidit.errors import InputError

FIRST_SEED = 42  # what the reference samplers start every prompt with
IDENTITY_FILE = "suite.json"
PARTIAL_FOLDER = ".partial"  # beside the folders that scorers list, never inside


@dataclass(frozen=True)
class ImageTarget:
    """One file a scorer reads: `path` relative to the output folder, drawn once per seed, `columns` to a row."""

    path: Path
    prompt: str
    seeds: tuple[int, ...]
    columns: int = 1


def missing(out: Path, targets: Iterable[ImageTarget]) -> list[ImageTarget]:
    """The targets whose file is not there yet, in order. Workers take `missing(...)[worker::workers]`."""
    return [target for target in targets if not (out / target.path).is_file()]


def save_target(out: Path, target: ImageTarget, images: Sequence[NDArray[np.uint8]]) -> None:
    """Writes the target's images, uint8 [H, W, 3] in the order of its seeds, as one PNG: whole or not at all.

    Several images become a grid, row by row. Raises InputError for another number of images or unequal sizes.
    """
    shapes = {image.shape for image in images}
    if len(images) != len(target.seeds) or len(shapes) != 1 or any(image.dtype != np.uint8 for image in images):
        raise InputError(
            f"{target.path}: needs {len(target.seeds)} uint8 images of one size, got {len(images)} of {sorted(shapes)}"
        )
    rows = [np.concatenate(images[i : i + target.columns], axis=1) for i in range(0, len(images), target.columns)]
    buffer = io.BytesIO()
    Image.fromarray(np.concatenate(rows, axis=0)).save(buffer, format="PNG")
    write_whole(out, target.path, buffer.getvalue())


def write_whole(out: Path, path: Path, content: bytes) -> None:
    """Writes `out / path` by way of a temporary file no scorer sees, so that a file that exists is complete."""
    partial = out / PARTIAL_FOLDER / uuid.uuid4().hex  # workers on several machines may share the folder
    partial.parent.mkdir(parents=True, exist_ok=True)
    partial.write_bytes(content)
    (out / path).parent.mkdir(parents=True, exist_ok=True)
    partial.replace(out / path)


def claim_folder(out: Path, identity: Mapping[str, object]) -> None:
    """Marks the output folder as belonging to one suite, prompt list and model; a folder of another one is refused.

    `identity`: JSON values such as the suite's name, the prompt file's and the model's digests, sampler and seed.
    """
    path = out / IDENTITY_FILE
    wanted = json.loads(json.dumps(dict(identity), sort_keys=True))
    if path.is_file():
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            different = sorted(key for key in {*wanted, *found} if wanted.get(key) != found.get(key))
        except (ValueError, TypeError):
            raise InputError(f"{path}: not readable; delete {out} or give a new folder") from None
        if different:
            raise InputError(f"{out}: holds images made with other {', '.join(different)}; give a new folder")
    elif out.is_dir() and any(out.iterdir()):
        raise InputError(f"{out}: not empty and without {IDENTITY_FILE}; give a new folder")
    else:
        write_whole(out, Path(IDENTITY_FILE), json.dumps(wanted, indent=1).encode())


def read_lines(path: Path) -> list[str]:
    """The lines of a UTF-8 text file without their ends. Raises InputError where it cannot be read or has none."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from None
    lines = text.split("\n")  # not splitlines(): a prompt may hold a form feed or a Unicode line separator
    while lines and not lines[-1].strip():
        lines.pop()
    if not lines:
        raise InputError(f"{path}: empty")
    return [line.removesuffix("\r") for line in lines]
