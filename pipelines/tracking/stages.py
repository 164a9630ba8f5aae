"""Ingest, embed and latents as runs of their own, so that what a training read leads to how it was
made.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from lidit.config import TrackingSettings
from lidit.store import digest_of
from pipelines.tracking.inputs import InputData
from pipelines.tracking.origin import DESCRIPTION
from pipelines.tracking.runs import JOB, MADE, MADE_FROM
from pipelines.tracking.store import store_uri
from pipelines.tracking.tracker import tracked_run


@dataclass(frozen=True)
class Stage:
    """A finished stage. made: what it wrote; reads: the corpus, but for an ingest; numbers: what it
    took.
    """

    kind: str
    name: str
    made: InputData
    reads: InputData | None
    params: Mapping[str, str]
    numbers: Mapping[str, float]


def track_stage(stage: Stage, settings: TrackingSettings | None, home: Path | None) -> None:
    """Log a finished stage: in the recipe's store, or for a command without a recipe in
    MLFLOW_TRACKING_URI's.

    home: folder of the sqlite store where no other is named; None: without a store nothing is
    tracked.
    """
    settings = settings or TrackingSettings(
        experiment=os.environ.get("MLFLOW_EXPERIMENT_NAME") or "lidit"
    )
    if home is None and not (settings.uri or os.environ.get("MLFLOW_TRACKING_URI")):
        return
    uri = store_uri(settings.uri, home or Path())
    # A stage is finished when it is tracked: what a silent tracker does not take is not worth a
    # folder that stays.
    with TemporaryDirectory(prefix="lidit-stage-") as folder:
        tags = {
            JOB: stage.kind,
            MADE: stage.made.digest,
            DESCRIPTION: f"Made `{stage.made.source}`.",
        }
        if stage.reads is not None:
            tags[MADE_FROM] = stage.reads.digest
        key = digest_of(
            {"stage": stage.kind, "made": stage.made.digest, "where": stage.made.source}
        )[:32]
        name = f"{stage.kind} {stage.name}"
        with tracked_run(
            uri, settings.experiment, name, key, stage.params, tags, Path(folder)
        ) as tracker:
            if stage.reads is not None:
                tracker.dataset(stage.reads, stage.kind)
            tracker.dataset(stage.made, "made")
            tracker.metrics(
                {f"{stage.kind}/{name}": value for name, value in stage.numbers.items()}, 0
            )
