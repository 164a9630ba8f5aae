"""The scene benchmark's images: sampled once, kept in GenEval's layout, read back one by one.

The folder's name is the digest of everything its images depend on, so an image in it is never of
other settings.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lidit.config import EvaluateSettings
from lidit.config.fields import LARGEST_SEED
from lidit.errors import InputError
from lidit.evals.suites.geneval import write_metadata
from lidit.evals.suites.targets import ImageTarget, missing, save_target
from lidit.pipeline import LIDiTPipeline, image_bytes
from pipelines.runtime.progress import ProgressBar

IMAGES = "images"
NAME_LENGTH = 16


def images_folder(identity: str) -> str:
    """Where the images of this identity (hexadecimal) are, relative to the evaluation's folder."""
    return f"{IMAGES}/{identity[:NAME_LENGTH]}"


def scene_targets(
    items: Sequence[Mapping[str, Any]], settings: EvaluateSettings
) -> list[ImageTarget]:
    """`00000/samples/0000.png` ..., prompt by prompt; every image of the benchmark has a seed of
    its own.
    """
    count = settings.images_per_prompt
    return [
        ImageTarget(
            Path(f"{prompt:05d}/samples/{image:04d}.png"),
            item["prompt"],
            ((settings.seed * 1_000_003 + prompt * count + image) & LARGEST_SEED,),
        )
        for prompt, item in enumerate(items)
        for image in range(count)
    ]


def sample_scenes(
    pipe: LIDiTPipeline,
    items: Sequence[Mapping[str, Any]],
    targets: Sequence[ImageTarget],
    folder: Path,
    batch_size: int,
) -> None:
    """Sample the targets that `folder` does not have yet, a batch in memory at a time."""
    absent = {target.path for target in missing(folder, targets)}
    if absent:  # otherwise an earlier call has written everything, the records first
        write_metadata(folder, items)
    with ProgressBar("draw", len(targets), "images", start=len(targets) - len(absent)) as progress:
        for start in range(0, len(targets), batch_size):
            batch = targets[start : start + batch_size]
            lacking = sum(target.path in absent for target in batch)
            if not lacking:
                continue
            # Sample the whole batch even if some images exist: batch composition can change an
            # image's last bits.
            drawn = pipe(
                [t.prompt for t in batch], seed=[t.seeds[0] for t in batch], output_type="pt"
            )
            for target, image in zip(batch, image_bytes(drawn.images)):
                if target.path in absent:
                    save_target(folder, target, [image])
            progress.advance(lacking)


def read_scenes(
    folder: Path, targets: Sequence[ImageTarget], per_prompt: int
) -> Iterator[Iterator[NDArray[np.uint8]]]:
    """The images of each prompt, read when they are asked for. Raises InputError for a file that is
    no image.
    """
    for start in range(0, len(targets), per_prompt):
        yield (read_image(folder / target.path) for target in targets[start : start + per_prompt])


def read_image(path: Path) -> NDArray[np.uint8]:
    try:
        with Image.open(path) as image:
            return np.array(image)
    except (OSError, SyntaxError, ValueError) as error:
        # Pillow raises SyntaxError for a broken PNG
        raise InputError(
            f"{path}: not readable as an image ({error}); delete it and run the same command again"
        ) from None


def remove_others(folder: Path) -> None:
    """Remove the images of earlier evaluations beside `folder`: their scores have been replaced."""
    for other in folder.parent.iterdir():
        if other.name != folder.name and re.fullmatch(f"[0-9a-f]{{{NAME_LENGTH}}}", other.name):
            shutil.rmtree(other, ignore_errors=True)
