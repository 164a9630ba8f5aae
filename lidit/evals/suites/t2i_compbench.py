"""T2I-CompBench (Karine-Huang/T2I-CompBench): the folders its scorers read, and the results they
write.

One folder per category with all images in `samples/`. The number in a file name is a running index
over the whole
category, not a seed: BLIP-VQA and CLIP write positions after sorting, UniDet writes the number, and
3-in-1 joins the two, so the indices must be contiguous from 0 in the order of the prompt file. For
the same reason a result file cannot
show that images were missing: the record of the sampling says how many images to expect.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lidit.errors import InputError
from lidit.evals.records import read_record
from lidit.evals.statistics import Interval, bootstrap_mean
from lidit.evals.suites.targets import FIRST_SEED, ImageTarget, read_lines, recorded_images

IMAGES_PER_PROMPT = 10
LONGEST_NAME = 255  # bytes of a file name on common file systems
# Where each category's official scorer leaves its scores; earlier versions of 2D-spatial wrote
# elsewhere.
RESULT_FILES: dict[str, tuple[str, ...]] = {
    "color": ("annotation_blip/vqa_result.json",),
    "shape": ("annotation_blip/vqa_result.json",),
    "texture": ("annotation_blip/vqa_result.json",),
    "spatial": (
        "labels/annotation_obj_detection_2d/vqa_result.json",
        "labels/annotation_obj_detection/vqa_result.json",
        "annotation_obj_detection/vqa_result.json",
    ),
    "3d_spatial": (
        "labels/annotation_obj_detection_3d/vqa_result.json",
        "annotation_obj_detection/vqa_result.json",
    ),
    "numeracy": ("annotation_num/vqa_result.json",),
    "non_spatial": ("annotation_clip/vqa_result.json",),
    "complex": ("annotation_3_in_1/vqa_result.json",),
}
# 3_in_1.py still looks for UniDet's results where an earlier 2D_spatial_eval.py left them
BEFORE_THREE_IN_ONE = (
    "copy labels/annotation_obj_detection_2d to annotation_obj_detection before 3_in_1.py"
)
LI_DIT_AVERAGE = ("color", "shape", "texture")  # what the LI-DiT paper averages (section 5.1)


def read_prompts(path: Path) -> list[str]:
    """One prompt per line, kept as it is (the trailing "." too).

    The scorers read the prompt back as the text before the first "_", so no prompt may hold this
    character. Raises InputError for a prompt that cannot be a file name.
    """
    prompts = read_lines(path)
    for number, prompt in enumerate(prompts, start=1):
        if not prompt.strip():
            raise InputError(
                f"{path}:{number}: empty prompt; file names would no longer match the "
                "scorers' order"
            )
        if any(character in prompt for character in "_/") or not prompt.isprintable():
            raise InputError(
                f"{path}:{number}: {prompt!r} holds '_', '/' or a control character; prompts "
                "are file names"
            )
        if len(f"{prompt}_000000.png".encode()) > LONGEST_NAME:
            raise InputError(
                f"{path}:{number}: prompt too long for a file name ({len(prompt.encode())} bytes)"
            )
    return prompts


def image_targets(
    category: str,
    prompts: Sequence[str],
    per_prompt: int = IMAGES_PER_PROMPT,
    seed: int = FIRST_SEED,
) -> list[ImageTarget]:
    """`CATEGORY/samples/{prompt}_{index:06d}.png`; image i of every prompt is drawn
    with seed + i.
    """
    _check(category)
    return [
        ImageTarget(
            Path(category, "samples", f"{prompt}_{number * per_prompt + image:06d}.png"),
            prompt,
            (seed + image,),
        )
        for number, prompt in enumerate(prompts)
        for image in range(per_prompt)
    ]


@dataclass(frozen=True)
class CategoryScore:
    """Mean over images of one category with a 95 % interval over prompts. `recorded`: the drawing
    said how many images there should be, and there are.
    """

    category: str
    score: Interval
    images: int
    recorded: bool


def read_category(out: Path, category: str, per_prompt: int = IMAGES_PER_PROMPT) -> CategoryScore:
    """The score of `out / category` from what its official scorer wrote there.

    Raises InputError where the results are absent, not numbered 0, 1, 2, ..., or not of as many
    images as were to be drawn (where nothing recorded that: as there are in `samples`).
    """
    _check(category)
    folder = out / category
    candidates = [folder / name for name in RESULT_FILES[category]]
    results = [path for path in candidates if path.is_file()]
    if not results:
        hint = f"; {BEFORE_THREE_IN_ONE}" if category == "complex" else ""
        raise InputError(
            f"{candidates[0]}: no results; run the official {category} scorer on {folder} "
            f"first{hint}"
        )
    answers, recorded = read_answers(results[0]), recorded_images(folder)
    _check_complete(folder / "samples", results[0], len(answers), recorded)
    if len(answers) % per_prompt:
        raise InputError(
            f"{results[0]}: {len(answers)} scores are no multiple of {per_prompt} images per prompt"
        )
    prompts = np.arange(len(answers)) // per_prompt
    return CategoryScore(
        category, bootstrap_mean(answers, prompts.tolist()), len(answers), recorded is not None
    )


def _check_complete(samples: Path, results: Path, scores: int, recorded: int | None) -> None:
    """`samples` need not be there any more: results are small and get copied without
    their images.
    """
    there = sum(path.stat().st_size > 0 for path in samples.iterdir()) if samples.is_dir() else None
    expected = there if recorded is None else recorded
    if expected is not None and there is not None and there < expected:
        raise InputError(
            f"{samples}: {there} of {expected} images; run the drawing again, then the scorer"
        )
    if expected is not None and scores != expected:
        raise InputError(
            f"{results}: {scores} scores, {expected} images; run the scorer on all of {samples}"
        )


def read_answers(path: Path) -> list[float]:
    """The scores of a `vqa_result.json` in the order of its question ids, which must be 0, 1, 2,
    ... without gaps.
    """
    try:
        records = read_record(path.read_text(encoding="utf-8"))
        answers = {int(record["question_id"]): float(record["answer"]) for record in records}
    except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
        raise InputError(f"{path}: not a list of question_id and answer ({error})") from None
    if len(answers) != len(records) or sorted(answers) != list(range(len(records))) or not records:
        raise InputError(
            f"{path}: question ids are not 0 to {len(records) - 1}; images must be numbered "
            "without gaps"
        )
    if not all(math.isfinite(value) for value in answers.values()):
        raise InputError(f"{path}: holds an answer that is not a number")
    return [answers[number] for number in range(len(answers))]


def li_dit_average(scores: Mapping[str, CategoryScore]) -> float | None:
    """Mean of color, shape and texture x 100, the paper's "T2I average"; None while one of them is
    absent.
    """
    if not all(category in scores for category in LI_DIT_AVERAGE):
        return None
    return 100 * float(np.mean([scores[category].score.value for category in LI_DIT_AVERAGE]))


def _check(category: str) -> None:
    if category not in RESULT_FILES:
        raise InputError(f"category {category!r} is unknown: choose from {', '.join(RESULT_FILES)}")
