"""One evaluation's results: recognised from an earlier call, or written, tracked and marked
complete.

card = Scorecard(out, job, made_with, tracking)
card.known(...)     the record of an earlier call with the same `made_with`, if there is one
card.evaluating()   around the work: the folder is owned, the tracker takes the experiment
card.begin()        the files in `out` are being replaced: the old score file goes first
card.publish(...)   metrics and files into an MLflow run, then the score file, last
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from lidit.config import TrackingSettings
from lidit.store import digest_of
from lidit.store.files.atomic import publish_bytes
from lidit.store.files.folder import Folder
from lidit.store.files.owner import owned
from pipelines import tracking
from pipelines.tracking.origin import DESCRIPTION

# Longer tables are read in the artifacts: MLflow takes 8,000 characters, the picture's among them.
TABLE_LIMIT = 6000


@dataclass(frozen=True)
class Scores:
    """`metrics`: flat numbers. `table`: Markdown. `computed`: False where an earlier call's scores
    were found.
    """

    metrics: dict[str, float]
    table: str
    folder: Path
    computed: bool


@dataclass(frozen=True)
class Job:
    """An evaluation as the tracker names it.

    home: folder of the sqlite store, unless settings or environment name another store. prefix: of
    the metrics' names.
    file: the score file; without one every call computes anew. training: id of the run above this
    one. about: begins the run's description.
    """

    run: str
    home: Path
    tags: Mapping[str, str]
    params: Mapping[str, str]
    prefix: str = ""
    file: str | None = None
    training: str = ""
    about: str = ""

    @classmethod
    def of_model(
        cls,
        title: str,
        model: Path,
        kind: str,
        params: Mapping[str, str],
        prefix: str,
        file: str | None = None,
    ) -> Self:
        """An evaluation of the model folder OUTPUT/NAME/model, tracked below the run of its
        training.
        """
        run_folder = model.resolve().parent
        tags = {"lidit.job": kind, "lidit.model": str(model)}
        training = tracking.read_run_id(run_folder)
        if training:
            tags[tracking.PARENT] = training
        return cls(
            f"{title} {run_folder.name}",
            run_folder.parent,
            tags,
            params,
            prefix,
            file,
            training,
            f"Of the model `{model}`.",
        )


class Scorecard:
    """The results of one evaluation in the folder `out`; `made_with` is everything
    they depend on.
    """

    def __init__(
        self, out: Path, job: Job, made_with: Mapping[str, Any], settings: TrackingSettings
    ) -> None:
        self.out, self.job, self.made_with, self.settings = out, job, made_with, settings
        self.identity = digest_of(made_with)

    def known(self, *keys: str) -> dict[str, Any] | None:
        """The score file's record, or None unless it was made with the same and
        holds all `keys`.
        """
        if self.job.file is None:
            return None
        try:
            record: dict[str, Any] = json.loads(
                (self.out / self.job.file).read_text(encoding="utf-8")
            )
            whole = record["identity"] == self.identity and all(key in record for key in keys)
        except (OSError, ValueError, KeyError, TypeError):
            return None  # missing or torn: the evaluation is made again
        return record if whole else None

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Own the folder while the evaluation runs. Raises InputError where another call owns it,
        and where the
        tracker refuses the experiment: before the evaluation's work.
        """
        tracking.check_experiment(
            tracking.store_uri(self.settings.uri, self.job.home), self.settings.experiment
        )
        with owned(self.out, "evaluated"):
            yield

    def begin(self) -> None:
        """Delete the old score file first: its presence means that the files beside it are
        complete.
        """
        self.out.mkdir(parents=True, exist_ok=True)
        if self.job.file is not None:
            (self.out / self.job.file).unlink(missing_ok=True)

    def publish(
        self,
        metrics: Mapping[str, float],
        files: Sequence[str],
        record: Mapping[str, Any] | None = None,
    ) -> None:
        """Track the metrics and the `files` of `out` in a run of their own, then write `record` as
        the score file. The run's description shows the record's table and the first picture.
        """
        job, prefix = self.job, f"{self.job.prefix}/" if self.job.prefix else ""
        recognised = {"lidit.identity": self.identity} if job.file is not None else {}
        uri = tracking.store_uri(self.settings.uri, job.home)
        table = str((record or {}).get("table", ""))
        described = [job.about, table if len(table) < TABLE_LIMIT else ""]
        about = "\n\n".join(filter(None, described))
        key = self.identity[:32]
        tags = {**job.tags, **recognised, **({DESCRIPTION: about} if about else {})}
        with tracking.tracked_run(
            uri, self.settings.experiment, job.run, key, job.params, tags, self.out
        ) as run:
            run.metrics(
                {f"{prefix}{name}": value for name, value in metrics.items()}, 0, job.training
            )
            shown = next((file for file in files if file.endswith(".png")), None)
            for file in files:
                if file == shown:
                    run.picture(self.out / file)
                else:
                    run.artifact(self.out / file)
        if job.file is not None:
            publish_bytes(Folder.at(self.out), job.file, json.dumps(record, indent=1).encode())
