"""A trained model on pictures it never saw: caption preference, and a grid of real pictures above drawn ones."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from lidit.config import TrackingSettings
from lidit.evals.caption_loss import pipeline_latents, pipeline_loss
from lidit.evals.held_out import caption_preference, read_pictures, wrong_captions
from lidit.evals.statistics import Interval
from lidit.pictures import labelled_grid
from lidit.store import digest_of
from pipelines import tracking
from pipelines.models import load_pipeline, weights_digest

SHOWN, COLUMNS = 16, 8
GRID, SCORES = "held-out.png", "held-out.json"


@dataclass(frozen=True)
class HeldOutScores:
    preference: Interval
    pictures: int
    grid: Path


def evaluate_held_out(
    model: Path, sources: Sequence[str], out: Path, tracker: TrackingSettings, count: int = 256, group: str = "style"
) -> HeldOutScores:
    """Measure on the first `count` pictures of `sources`, draw the captions of the first 16, write both into `out`."""
    pipe = load_pipeline(model)
    pictures = read_pictures(sources, int(pipe.config.width), int(pipe.config.height), count, group)
    captions, wrong = [picture.caption for picture in pictures], wrong_captions(pictures)
    images = torch.from_numpy(np.stack([picture.image for picture in pictures]))  # [N, H, W, 3]
    latents = pipeline_latents(pipe, images.permute(0, 3, 1, 2).float() / 127.5 - 1)
    preference = caption_preference(pipeline_loss(pipe, captions), latents, captions, wrong)
    shown = pictures[:SHOWN]
    drawn = pipe([picture.caption for picture in shown], seed=list(range(len(shown))), output_type="np")
    cells, labels = [], []
    for start in range(0, len(shown), COLUMNS):
        row = shown[start : start + COLUMNS]
        cells += [picture.image for picture in row] + list(drawn[start : start + COLUMNS])
        labels += [f"real: {picture.caption}" for picture in row] + ["drawn"] * len(row)
    out.mkdir(parents=True, exist_ok=True)
    labelled_grid(cells, labels, columns=min(COLUMNS, len(shown))).save(out / GRID)
    identity = digest_of({"model": weights_digest(model), "keys": [picture.key for picture in pictures]})
    uri = tracking.store_uri(tracker.uri, model.resolve().parent.parent)
    tags = {"lidit.job": "evaluate", "lidit.model": str(model), "lidit.identity": identity}
    name = f"held out {model.resolve().parent.name}"
    with tracking.tracked_run(uri, tracker.experiment, name, identity[:32], {"count": str(count)}, tags, out) as run:
        run.metrics({"held_out/caption_preference": preference.value}, 0)
        run.artifact(out / GRID)
    record = {"caption_preference": vars(preference), "pictures": len(pictures), "identity": identity}
    (out / SCORES).write_text(json.dumps(record, indent=1))
    return HeldOutScores(preference, len(pictures), out / GRID)
