"""Ingest over many machines: `lidit.sources.ingest` with one Ray task per source file.

One file of captions is read in this process instead: it would be one task whatever the cluster, and
no decoder meets its bytes.
"""

from __future__ import annotations

from collections.abc import Sequence

from lidit.config import IngestSettings
from lidit.progress import SILENT, Progress
from lidit.sources import SourceFile
from lidit.sources.ingest import Ingest, IngestSummary, ingest_here
from lidit.sources.staging import StagedSource, refused_unread, stage_source
from lidit.sources.units import write_units
from lidit.store.files.folder import Folder
from lidit.store.files.owner import owned
from pipelines.runtime import resources
from pipelines.runtime.prometheus import IngestMetrics
from pipelines.runtime.tasks import in_tasks


def run_ingest(
    sources: Sequence[str],
    corpus: str,
    settings: IngestSettings,
    progress: Progress = SILENT,
    cpus: int = 1,
) -> IngestSummary:
    """Make `corpus` from `sources` (files, folders, globs, URLs), as `lidit.sources.ingest.ingest`
    does.

    cpus: at least so many logical CPUs for an embedded Ray that is started here. A finished corpus
    starts none. Raises InputError as `ingest` does; JobError for a source that cannot be read at
    all.
    """
    job = Ingest(sources, corpus, settings)
    if (summary := job.finished()) is not None:
        return summary
    if _is_one_list(job) and resources.is_alone():
        return ingest_here(job, progress)
    with owned(job.folder, "made"):
        return _compute(job, settings, progress, cpus)


def _is_one_list(job: Ingest) -> bool:
    """Whether the only source is a file of captions, whose pictures, if it names any, are not
    read.
    """
    if len(job.files) != 1:
        return False
    kind = job.files[0].kind
    return kind == "text" or (job.settings.captions_only and kind not in ("tar", "folder"))


def _compute(job: Ingest, settings: IngestSettings, progress: Progress, cpus: int) -> IngestSummary:
    unread = job.begin(progress)
    resources.connect(cpus)

    # Read and check every source that no earlier call has read.
    metrics = IngestMetrics(job.folder.location.rpartition("/")[2])
    readings = ((file.path, (job.staging, file, index, settings)) for index, file in unread)
    for staged in in_tasks(stage_source, readings, _refuse_source):
        metrics.source_read(staged.samples, sum(staged.refused.values()))
        job.add_read(staged, progress)

    # Write every source's units; writing them again after a crash gives the same bytes.
    writings = (
        (listing.name, (job.folder, job.staging, listing)) for listing in job.number_units()
    )
    return job.publish(list(in_tasks(write_units, writings)))


def _refuse_source(
    staging: Folder, file: SourceFile, index: int, settings: IngestSettings
) -> StagedSource:
    """One refusal instead of the source that ended its worker each time: the other sources go
    on."""
    return stage_source(
        staging, refused_unread(file, "each of three processes ended"), index, settings
    )
