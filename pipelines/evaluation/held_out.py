"""A trained model on pictures it never saw: caption preference, and a grid of real pictures above drawn ones."""

from __future__ import annotations

import json
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
from lidit.evals.statistics import Interval
from lidit.pipeline import LIDiTPipeline
from lidit.plots import labelled_grid
from lidit.store import digest_of
from lidit.store.files.atomic import publish_bytes
from lidit.store.files.folder import Folder
from pipelines import tracking
from pipelines.evaluation.models import load_pipeline, model_identity

SHOWN, COLUMNS = 16, 8
GRID, SCORES = "held-out.png", "held-out.json"


@dataclass(frozen=True)
class HeldOutScores:
    """`motifs`: pictures that are no near copies of each other."""

    preference: Interval
    pictures: int
    motifs: int
    grid: Path
    computed: bool


def evaluate_held_out(
    model: Path, sources: Sequence[str], settings: EvaluateSettings, tracker: TrackingSettings, out: Path
) -> HeldOutScores:
    """Measure on the first pictures of `sources`, draw the captions of the first 16, write both into `out`.

    Nothing is done again for the same model and the same pictures. Raises InputError where `model` is no model folder,
    or a source holds no pictures with captions.
    """
    identified = model_identity(model, settings.sampler)
    pictures = read_pictures(sources, identified["width"], identified["height"], settings.pictures)
    if not pictures:
        raise InputError(f"{', '.join(sources)}: no pictures with captions")
    shown = {"keys": [picture.key for picture in pictures], "captions": [picture.caption for picture in pictures]}
    identity = digest_of({"model": identified, **shown})
    if known := _known(out, identity):
        return known
    pipe = load_pipeline(model)
    pipe.sampler = settings.sampler.applied(pipe.sampler)
    preference, motifs = _measure(pipe, pictures), len({picture.motif for picture in pictures})
    out.mkdir(parents=True, exist_ok=True)
    (out / SCORES).unlink(missing_ok=True)
    _draw(pipe, pictures[:SHOWN], out / GRID)
    uri = tracking.store_uri(tracker.uri, model.resolve().parent.parent)
    tags = {"lidit.job": "evaluate", "lidit.model": str(model), "lidit.identity": identity}
    name, params = f"held out {model.resolve().parent.name}", {"pictures": str(len(pictures)), "motifs": str(motifs)}
    with tracking.tracked_run(uri, tracker.experiment, name, identity[:32], params, tags, out) as run:
        bounds = {"": preference.value, "_low": preference.low, "_high": preference.high}
        run.metrics({f"held_out/caption_preference{end}": value for end, value in bounds.items()}, 0)
        run.artifact(out / GRID)
    record = {
        "caption_preference": vars(preference), "pictures": len(pictures), "motifs": motifs, "identity": identity,
    }  # fmt: skip
    publish_bytes(Folder.at(out), SCORES, json.dumps(record, indent=1).encode())
    return HeldOutScores(preference, len(pictures), motifs, out / GRID, computed=True)


def _measure(pipe: LIDiTPipeline, pictures: Sequence[HeldOutPicture]) -> Interval:
    captions, wrong = [picture.caption for picture in pictures], wrong_captions(pictures)
    images = torch.from_numpy(np.stack([picture.image for picture in pictures]))  # [N, H, W, 3]
    latents = pipeline_latents(pipe, images.permute(0, 3, 1, 2).float() / 127.5 - 1)
    motifs = [picture.motif for picture in pictures]
    return caption_preference(pipeline_loss(pipe, captions), latents, captions, wrong, motifs)


def _draw(pipe: LIDiTPipeline, pictures: Sequence[HeldOutPicture], path: Path) -> None:
    """Rows of real pictures, each above a row of what the model draws for their captions."""
    drawn = pipe([picture.caption for picture in pictures], seed=list(range(len(pictures))), output_type="np")
    cells: list[Any] = []
    labels: list[str] = []
    for start in range(0, len(pictures), COLUMNS):
        row = pictures[start : start + COLUMNS]
        cells += [picture.image for picture in row] + list(drawn[start : start + COLUMNS])
        labels += [f"real: {picture.caption}" for picture in row] + ["drawn"] * len(row)
    labelled_grid(cells, labels, columns=min(COLUMNS, len(pictures))).save(path)


def _known(out: Path, identity: str) -> HeldOutScores | None:
    try:
        known = json.loads((out / SCORES).read_text(encoding="utf-8"))
        if known["identity"] != identity or not (out / GRID).is_file():
            return None
        preference = Interval(**known["caption_preference"])
        return HeldOutScores(preference, known["pictures"], known["motifs"], out / GRID, computed=False)
    except (OSError, ValueError, KeyError, TypeError):
        return None  # not there or not whole: it is made again
