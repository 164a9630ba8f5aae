"""GenEval (djghosh13/geneval): the folders its scorer reads, and the summary of what it writes.

Run the official scorer with `evaluate_images.py OUT --outfile results.jsonl`. Report raw prompts
and four images per
prompt: published numbers with rewritten prompts or twelve images are not comparable.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lidit.errors import InputError
from lidit.evals.records import read_record
from lidit.evals.statistics import Interval, bootstrap_mean
from lidit.evals.suites.targets import FIRST_SEED, ImageTarget, read_lines, write_whole

IMAGES_PER_PROMPT = 4


def read_prompts(path: Path) -> list[dict[str, Any]]:
    """The prompt records of `evaluation_metadata.jsonl`, one JSON object per line.

    Raises InputError naming the first line that is no such record.
    """
    items = []
    for number, line in enumerate(read_lines(path), start=1):
        try:
            item = read_record(line)
            good = (
                isinstance(item["prompt"], str)
                and isinstance(item["tag"], str)
                and isinstance(item["include"], list)
            )
        except (ValueError, KeyError, TypeError):
            good = False
        if not good:
            raise InputError(
                f"{path}:{number}: expected a JSON object with tag, include and prompt"
            )
        items.append(item)
    return items


def image_targets(
    items: Sequence[Mapping[str, Any]], per_prompt: int = IMAGES_PER_PROMPT, seed: int = FIRST_SEED
) -> list[ImageTarget]:
    """`00000/samples/0000.png` ...; image i of every prompt is drawn with seed + i."""
    return [
        ImageTarget(Path(f"{number:05d}/samples/{image:04d}.png"), item["prompt"], (seed + image,))
        for number, item in enumerate(items)
        for image in range(per_prompt)
    ]


def write_metadata(out: Path, items: Sequence[Mapping[str, Any]]) -> None:
    """`00000/metadata.jsonl` ...: ONE JSON object each, as the scorer loads it; those that are
    there are left alone.
    """
    for number, item in enumerate(items):
        path, content = Path(f"{number:05d}/metadata.jsonl"), json.dumps(dict(item)).encode()
        if not (out / path).is_file() or (out / path).read_bytes() != content:
            write_whole(out, path, content)


@dataclass(frozen=True)
class GenEvalSummary:
    """GenEval's own aggregates: `overall` is the unweighted mean of the tags; shares of images and
    of prompts with any correct image; `tags` with 95 % intervals over prompts. `uneven`: prompts
    with more or fewer than four images -> how many.
    """

    tags: dict[str, Interval]
    overall: float
    correct_images: float
    correct_prompts: float
    images: int
    prompts: int
    uneven: dict[str, int]

    def metrics(self) -> dict[str, float]:
        flat = {tag: interval.value for tag, interval in self.tags.items()}
        return flat | {
            "overall": self.overall,
            "correct_images": self.correct_images,
            "correct_prompts": self.correct_prompts,
        }


def read_results(path: Path) -> GenEvalSummary:
    """Sums up the official scorer's results file (and our own). InputError names a line that is not
    a result.
    """
    tags: dict[str, list[tuple[str, bool]]] = {}
    names: dict[str, str] = {}
    for number, line in enumerate(read_lines(path), start=1):
        try:
            record = read_record(line)
            tag, correct, metadata = record["tag"], record["correct"], record["metadata"]
        except (ValueError, KeyError, TypeError):
            raise InputError(
                f"{path}:{number}: expected a result with tag, correct and metadata"
            ) from None
        if not isinstance(tag, str):
            raise InputError(
                f"{path}:{number}: tag is {tag!r}, expected a string; run evaluate_images.py again"
            )
        if not isinstance(correct, bool):
            raise InputError(f"{path}:{number}: correct is {correct!r}, expected true or false")
        prompt = metadata if isinstance(metadata, str) else json.dumps(metadata)
        names[prompt] = str(record.get("prompt", prompt))
        tags.setdefault(tag, []).append((prompt, correct))
    rows = [row for group in tags.values() for row in group]
    means = {
        tag: bootstrap_mean([c for _, c in group], [p for p, _ in group])
        for tag, group in tags.items()
    }
    prompts = Counter(prompt for prompt, _ in rows)
    return GenEvalSummary(
        tags=means,
        overall=float(np.mean([interval.value for interval in means.values()])),
        correct_images=float(np.mean([correct for _, correct in rows])),
        correct_prompts=len({prompt for prompt, correct in rows if correct}) / len(prompts),
        images=len(rows),
        prompts=len(prompts),
        uneven={
            names[prompt]: count for prompt, count in prompts.items() if count != IMAGES_PER_PROMPT
        },
    )
