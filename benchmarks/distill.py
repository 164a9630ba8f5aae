"""Distilled students against their teacher: pictures per second and scores, in the same run.

    python -m benchmarks.distill demo/runs/demo/model demo/runs/demo-4-steps/model --out
    benchmarks/distillation

Every model draws as its own folder says, from states that the teacher's LLMs encoded once.
Pictures: one per prompt of the scene benchmark, the prompts and seeds of `lidit evaluate`, the same
for all models. For each student:

- `ratio_images_per_second`: its pictures per second over the teacher's. All models in turns, one
  thread of torch, batches of 32 with decoding; the median over rounds of the teacher's processor
  time over the student's, which other processes on the machine do not stretch.
- `score_ratio`: its strict score overall over the teacher's; `difference` is its score less the
  teacher's, paired by picture, with the 95 % interval.
- `evaluations`: of the network for one picture, counted while drawing.

The grid has a row of the teacher's pictures above a row of each student's, for the first prompts of
each category. The last line printed is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lidit.config import EvaluateSettings
from lidit.datasets.scenes.benchmark import benchmark_prompts
from lidit.evals.scenes.scorer import score_image
from lidit.evals.statistics import Interval, bootstrap_overall
from lidit.grids import labelled_grid
from lidit.models import TextStates
from lidit.pipeline import LIDiTPipeline, image_bytes
from pipelines.evaluation.models import load_pipeline, weights_digest
from pipelines.evaluation.scene_images import scene_targets

BATCH = 32
SHOWN_PER_TAG = 2
Images = NDArray[np.uint8]


@dataclass(eq=False)
class Model:
    """A model under test. evaluations: rows that the network has seen, for one picture."""

    folder: Path
    pipe: LIDiTPipeline
    seconds: list[float] = field(default_factory=list)
    images: list[Images] = field(default_factory=list)
    strict: list[float] = field(default_factory=list)
    evaluations: float = 0.0

    @classmethod
    def load(cls, folder: Path) -> Model:
        return cls(folder, load_pipeline(folder))

    def draw(
        self, states: dict[str, TextStates], part: slice, seeds: Sequence[int]
    ) -> list[Images]:
        """A batch as the folder says, bytes [H, W, 3]."""
        cut = {
            name: TextStates(s.states[part], s.mask[part], s.prefix) for name, s in states.items()
        }
        return list(
            image_bytes(self.pipe(states=cut, seed=list(seeds[part]), output_type="pt").images)
        )


def draw_all(
    models: Sequence[Model], items: Sequence[dict[str, Any]], settings: EvaluateSettings
) -> None:
    """Every model's pictures and scores; the models take turns batch by batch."""
    states = models[0].pipe.encode_prompts([item["prompt"] for item in items])
    seeds = [target.seeds[0] for target in scene_targets(items, settings)]
    for model in models:
        model.draw(states, slice(0, 2), seeds)  # what only a first call pays is paid
        rows: list[int] = []
        hook = model.pipe.model.transformer.register_forward_pre_hook(
            lambda _, x, rows=rows: rows.append(len(x[0]))
        )
        model.draw(states, slice(0, 4), seeds)
        hook.remove()
        model.evaluations = sum(rows) / 4
    for start in range(0, len(items), BATCH):
        part = slice(start, start + BATCH)
        for model in models:
            began = time.process_time()
            drawn = model.draw(states, part, seeds)
            if len(drawn) == BATCH:
                model.seconds.append(time.process_time() - began)
            model.images += drawn
            model.strict += [
                float(score_image(image, item).strict) for image, item in zip(drawn, items[part])
            ]
        print(f"{min(start + BATCH, len(items))} of {len(items)} prompts", flush=True)


def overall(values: Sequence[float], items: Sequence[dict[str, Any]]) -> Interval:
    return bootstrap_overall(values, [item["tag"] for item in items], list(range(len(items))))


def compared(student: Model, teacher: Model, items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    score, own = overall(student.strict, items), overall(teacher.strict, items)
    paired = [mine - theirs for mine, theirs in zip(student.strict, teacher.strict, strict=True)]
    ratios = [theirs / mine for mine, theirs in zip(student.seconds, teacher.seconds, strict=True)]
    return {
        "student": student.folder.resolve().parent.name,
        "weights": weights_digest(student.folder)[:12],
        "evaluations": student.evaluations,
        "score": asdict(score),
        "score_ratio": round(score.value / own.value, 3),
        "difference": asdict(overall(paired, items)),
        "ratio_images_per_second": round(statistics.median(ratios), 2),
        "images_per_processor_second": round(BATCH / statistics.median(student.seconds), 1),
    }


def write_grid(path: Path, models: Sequence[Model], items: Sequence[dict[str, Any]]) -> None:
    """The first prompts of each category: a row per model, framed by the strict rule."""
    tags = list(dict.fromkeys(item["tag"] for item in items))
    places = [
        p
        for tag in tags
        for p in [i for i, item in enumerate(items) if item["tag"] == tag][:SHOWN_PER_TAG]
    ]
    images = [model.images[place] for model in models for place in places]
    labels = [items[place]["prompt"] for _ in models for place in places]
    right = [bool(model.strict[place]) for model in models for place in places]
    rows = [model.folder.resolve().parent.name for model in models]
    labelled_grid(images, labels, columns=len(places), right=right, headings=rows).save(path)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("teacher", type=Path, help="model folder")
    parser.add_argument("students", type=Path, nargs="+", help="model folders")
    parser.add_argument("--per-tag", type=int, default=24, help="prompts per category")
    parser.add_argument("--layout", default="simple")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/distillation"), help="folder for the grid"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    models = [Model.load(folder) for folder in (arguments.teacher, *arguments.students)]
    teacher, students = models[0], models[1:]
    settings = EvaluateSettings(per_tag=arguments.per_tag, layout=arguments.layout)
    items = benchmark_prompts(
        teacher.pipe.config.height, settings.layout, settings.seed, settings.per_tag
    )
    draw_all(models, items, settings)
    arguments.out.mkdir(parents=True, exist_ok=True)
    write_grid(arguments.out / "grid.png", models, items)
    rows = [compared(student, teacher, items) for student in students]
    facts = {
        "prompts": len(items),
        "teacher_evaluations": teacher.evaluations,
        "teacher_score": asdict(overall(teacher.strict, items)),
        "teacher_images_per_processor_second": round(BATCH / statistics.median(teacher.seconds), 1),
        "torch": torch.__version__,
    }
    print(json.dumps({"benchmark": "distill", **facts, **rows[0], "students": rows}))


if __name__ == "__main__":
    main()
