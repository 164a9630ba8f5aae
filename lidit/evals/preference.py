"""Held-out pictures with captions: does a model prefer each picture's own caption?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from lidit.config import IngestSettings
from lidit.errors import InputError
from lidit.evals.classifier.binding import TIMESTEPS, LossFunction, loss_table, wins
from lidit.evals.statistics import Interval, bootstrap_mean
from lidit.images import BadImageError, Bucket, decode_image, fit
from lidit.sources import FieldNames, RawSample, expand, read_source
from lidit.sources.base import OpenedSource


@dataclass(frozen=True)
class HeldOutPicture:
    """image: uint8 [height, width, 3], fitted as for training.

    group: shared by pictures of a kind, such as a style. motif: shared by near copies, whose
    results are alike.
    """

    key: str
    caption: str
    image: NDArray[np.uint8]
    group: str
    motif: str


def read_pictures(
    sources: Sequence[str], width: int, height: int, count: int
) -> list[HeldOutPicture]:
    """The first `count` pictures of the sources, each with its first caption.

    Metadata may name a `style` (the group; without it all pictures share a group) and a `motif`
    (without it each picture has its own). Raises InputError for a source without pictures and
    captions, and for an unreadable picture.
    """
    settings = IngestSettings()
    fields = FieldNames(settings.caption_fields, settings.image_fields, captions_only=False)
    pictures: list[HeldOutPicture] = []
    for file in expand(sources)[1]:
        opened = OpenedSource(file)
        try:
            for raw in read_source(opened, fields):
                if not isinstance(raw, RawSample) or raw.image is None or not raw.captions:
                    raise InputError(
                        f"{file.path}: a sample without image or caption cannot be compared "
                        "with anything"
                    )
                try:
                    image, _ = fit(decode_image(raw.image).image, Bucket(width, height))
                except BadImageError as error:
                    raise InputError(f"{file.path}: {raw.key}: {error}") from None
                style, motif = str(raw.meta.get("style", "")), str(raw.meta.get("motif", raw.key))
                pictures.append(
                    HeldOutPicture(raw.key, raw.captions[0][0], np.asarray(image), style, motif)
                )
                if len(pictures) == count:
                    return pictures
        finally:
            opened.close()
    return pictures


def wrong_captions(pictures: Sequence[HeldOutPicture]) -> list[str]:
    """For each picture the next other caption of its group, going round.

    Raises InputError for a group with a single caption.
    """
    wrong = []
    for place, picture in enumerate(pictures):
        order = [*pictures[place + 1 :], *pictures[:place]]
        others = (
            p.caption for p in order if p.group == picture.group and p.caption != picture.caption
        )
        other = next(others, None)
        if other is None:
            raise InputError(
                f"{picture.key}: no other caption of its kind ({picture.group}); take more pictures"
            )
        wrong.append(other)
    return wrong


@torch.no_grad()
def caption_preference(
    loss: LossFunction,
    latents: torch.Tensor,
    captions: Sequence[str],
    wrong: Sequence[str],
    motifs: Sequence[str] | None = None,
    seed: int = 0,
) -> Interval:
    """Share of pictures, `latents` [N, C, H, W], with a lower loss under their own caption; chance
    0.5.

    `motifs` [N]: near copies share one, and the interval takes them as one draw.
    """
    gaps = loss_table(loss, latents, list(wrong), TIMESTEPS, 64, seed) - loss_table(
        loss, latents, list(captions), TIMESTEPS, 64, seed
    )
    return bootstrap_mean(wins(gaps.mean(axis=1)), motifs)
