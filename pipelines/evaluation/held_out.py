"""A trained model on pictures it never saw: caption preference, and a grid of real pictures above
sampled ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lidit.config import EvaluateSettings, TrackingSettings
from lidit.errors import InputError
from lidit.evals.classifier.caption_loss import pipeline_latents, pipeline_loss
from lidit.evals.preference import HeldOutPicture, caption_preference, read_pictures, wrong_captions
from lidit.evals.scenes.evaluation import with_bounds
from lidit.evals.statistics import Interval
from lidit.grids import labelled_grid
from lidit.pipeline import LIDiTPipeline, image_bytes
from lidit.pixels import from_bytes
from pipelines.evaluation.models import load_pipeline, model_identity
from pipelines.evaluation.scorecard import Job, Scorecard

SHOWN, COLUMNS = 16, 8
GRID, SCORES = "held-out.png", "held-out.json"


@dataclass(frozen=True)
class CaptionMatch:
    """`preference`: share of the pictures that match their own caption better than another
    picture's.

    `motifs`: pictures that are no near copies of each other.
    """

    preference: Interval
    pictures: int
    motifs: int
    grid: Path
    computed: bool


def evaluate_held_out(
    model: Path,
    sources: Sequence[str],
    settings: EvaluateSettings,
    tracker: TrackingSettings,
    out: Path,
) -> CaptionMatch:
    """Measure on the first pictures of `sources`, sample the captions of the first 16, write both
    into `out`.

    Nothing is done again for the same model and the same pictures. Raises InputError where `model`
    is no model folder, or a source holds no pictures with captions.
    """
    # What the result depends on, and whether an earlier call has it.
    identified = model_identity(model, settings.sampler)
    pictures = read_pictures(sources, identified["width"], identified["height"], settings.pictures)
    if not pictures:
        raise InputError(f"{', '.join(sources)}: no pictures with captions")
    motifs = len({picture.motif for picture in pictures})
    shown = {
        "keys": [picture.key for picture in pictures],
        "captions": [picture.caption for picture in pictures],
    }
    params = {"pictures": str(len(pictures)), "motifs": str(motifs)}
    job = Job.of_model("held out", model, "evaluate", params, "held_out", SCORES)
    card = Scorecard(out, job, {"model": identified, **shown}, tracker)
    known = card.known("caption_preference", "pictures", "motifs")
    if known and (out / GRID).is_file():
        preference = Interval(**known["caption_preference"])
        return CaptionMatch(
            preference, known["pictures"], known["motifs"], out / GRID, computed=False
        )
    with card.evaluating():
        # Measure.
        pipe = load_pipeline(model, settings.sampler)
        preference = _measure(pipe, pictures)
        # Sample some of the captions, and write the results.
        card.begin()
        _sample_grid(pipe, pictures[:SHOWN], out / GRID)
        record = {
            "caption_preference": vars(preference),
            "pictures": len(pictures),
            "motifs": motifs,
            "identity": card.identity,
        }
        card.publish(with_bounds("caption_preference", preference), [GRID], record)
        return CaptionMatch(preference, len(pictures), motifs, out / GRID, computed=True)


def _measure(pipe: LIDiTPipeline, pictures: Sequence[HeldOutPicture]) -> Interval:
    captions, wrong = [picture.caption for picture in pictures], wrong_captions(pictures)
    images = torch.from_numpy(np.stack([picture.image for picture in pictures]))  # [N, H, W, 3]
    latents = pipeline_latents(pipe, from_bytes(images.permute(0, 3, 1, 2)))
    motifs = [picture.motif for picture in pictures]
    return caption_preference(pipeline_loss(pipe, captions), latents, captions, wrong, motifs)


def _sample_grid(pipe: LIDiTPipeline, pictures: Sequence[HeldOutPicture], path: Path) -> None:
    """Rows of real pictures, each above a row of what the model draws for their captions."""
    drawn = pipe(
        [picture.caption for picture in pictures], seed=list(range(len(pictures))), output_type="pt"
    )
    sampled = image_bytes(drawn.images)
    cells: list[Any] = []
    labels: list[str] = []
    for start in range(0, len(pictures), COLUMNS):
        row = pictures[start : start + COLUMNS]
        cells += [picture.image for picture in row] + list(sampled[start : start + COLUMNS])
        labels += [f"real: {picture.caption}" for picture in row] + ["drawn"] * len(row)
    labelled_grid(cells, labels, columns=min(COLUMNS, len(pictures))).save(path)
