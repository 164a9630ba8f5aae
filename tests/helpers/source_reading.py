"""What the readers make of a source, without a corpus around it."""

from __future__ import annotations

import hashlib
from pathlib import Path

from lidit.config import IngestSettings
from lidit.sources import FieldNames, OpenedSource, RawSample, expand, read_source
from lidit.sources.staging import StagedSource, stage_source
from lidit.store import Refusal
from lidit.store.files.folder import Folder

DEFAULTS = IngestSettings()


def read(path: Path | str, captions_only: bool = False) -> tuple[list[RawSample], list[Refusal]]:
    """Every sample and refusal of one source; the hash taken on the way is that of the file."""
    _, files, *_ = expand([str(path)])
    found = []
    for file in files:
        opened = OpenedSource(file)
        fields = FieldNames(DEFAULTS.caption_fields, DEFAULTS.image_fields, captions_only)
        found += list(read_source(opened, fields))
        opened.finish()
        if file.kind != "folder":
            assert opened.sha256_read == hashlib.sha256(Path(file.path).read_bytes()).hexdigest()
        opened.close()
    return [f for f in found if isinstance(f, RawSample)], [
        f for f in found if isinstance(f, Refusal)
    ]


def stage(
    path: Path | str, **settings: object
) -> tuple[list[StagedSource], list[dict], list[dict]]:
    """Every source file below `path` staged as an ingest does it: the records, the staged samples,
    the refusals.
    """
    _, files, *_ = expand([str(path)])
    folder = Folder.at(Path(files[0].path).parent / f"staged-{Path(files[0].path).name}")
    folder.create()
    records = [
        stage_source(folder, file, i, IngestSettings(**settings)) for i, file in enumerate(files)
    ]
    samples, refused = (
        [
            row
            for i in range(len(files))
            for row in folder.read_table(f"{i:06d}-{kind}.arrow").to_pylist()
        ]
        for kind in ("samples", "refused")
    )
    return records, samples, refused
