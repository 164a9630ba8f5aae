"""One source file read, checked and written down, before units are numbered.

A staged source is three files under CORPUS/ingest/: NNNNN-samples.arrow, NNNNN-refused.arrow and,
last, NNNNN.json. They hold text and references only; images stay where they are.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from lidit.config import IngestSettings
from lidit.errors import InputError, JobError, one_line
from lidit.sources import FieldNames, OpenedSource, RawSample, SourceFile, read_source
from lidit.sources.apart import ReaderDiedError, call_apart, serve
from lidit.sources.base import shown
from lidit.sources.filters import SampleChecker
from lidit.store import Refusal, Sample
from lidit.store.files.atomic import arrow_writer, publish_bytes, publish_written
from lidit.store.files.folder import Folder
from lidit.store.samples import quarantine_table
from lidit.store.schema import IMAGE_REFERENCE, canonical_json

STAGING = "ingest"
_CHUNK_ROWS = 4096
_ROWS = ("table", "jsonl", "csv")
_IPC = (".arrow", ".feather", ".ipc")
STAGED = pa.schema(
    [
        ("key", pa.large_string()),
        ("key_hash", pa.binary(16)),
        # of rows only, where it tells copies from further captions of one image
        ("image_hash", pa.binary(16)),
        ("captions", pa.list_(pa.struct([("text", pa.large_string()), ("origin", pa.string())]))),
        ("image", IMAGE_REFERENCE),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("bucket", pa.string()),
        ("meta", pa.large_string()),
    ]
)


@dataclass(frozen=True)
class StagedSource:
    """What a staged source file came to. named: files of images that its rows name."""

    index: int
    name: str
    bytes: int
    modified: str
    sha256: str
    samples: int
    images: int
    refused: dict[str, int]
    refused_captions: int
    ignored: dict[str, int]
    columns: dict[str, str]
    named: int


def read_class_names(path: str | None) -> dict[str, str]:
    """Class label -> name. Lines are names, labelled 0, 1, ..., or all of the form
    `n01440764 tench`.

    Raises InputError where the file is not there or empty.
    """
    if path is None:
        return {}
    try:
        names = [
            line.strip() for line in Path(path).read_text("utf-8").splitlines() if line.strip()
        ]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: class names cannot be read: {error}") from None
    if not names:
        raise InputError(f"{path}: no class name in the file")
    pairs = [line.split(maxsplit=1) for line in names]
    if all(len(pair) == 2 and any(c.isdigit() for c in pair[0]) for pair in pairs):
        return dict(pairs)
    return {str(index): name for index, name in enumerate(names)}


def staged_name(index: int) -> str:
    return f"{index:06d}"


def read_staged(folder: Folder, source: SourceFile, index: int) -> StagedSource | None:
    """The record of an earlier, finished reading; None where there is none.

    Raises InputError where the source has changed since.
    """
    try:
        staged = StagedSource(**json.loads(folder.read_bytes(f"{staged_name(index)}.json")))
    except (FileNotFoundError, ValueError, TypeError):
        return None
    if (staged.name, staged.bytes, staged.modified) != (source.name, source.bytes, source.modified):
        raise InputError(
            f"{source.path}: has changed since this ingest began; delete {folder.location} to "
            "read everything again"
        )
    return staged


def stage_source(
    folder: Folder, source: SourceFile, index: int, settings: IngestSettings
) -> StagedSource:
    """Read one source file to its end. Raises JobError where it cannot be read at all.

    Arrow IPC files are read in a process of their own, which their offsets may end: then they are
    refused.
    """
    standing = read_staged(folder, source, index)
    if standing is not None:
        return standing
    if source.problem is None and source.path.lower().endswith(_IPC):
        try:
            call_apart(__name__, _arguments(folder, source, index, settings), source.path)
        except ReaderDiedError as error:
            return _read_and_stage(folder, refused_unread(source, str(error)), index, settings)
        standing = read_staged(folder, source, index)
        assert standing is not None
        return standing
    return _read_and_stage(folder, source, index, settings)


def refused_unread(source: SourceFile, died_of: str) -> SourceFile:
    """The source as one refusal, after its bytes have ended the process that read them."""
    return replace(
        source,
        problem=f"reader died: {died_of} while reading {shown(source.name)}; write this file anew",
    )


def _arguments(
    folder: Folder, source: SourceFile, index: int, settings: IngestSettings
) -> dict[str, Any]:
    return {
        "folder": folder.location,
        "source": asdict(source),
        "index": index,
        "settings": settings.model_dump(mode="json"),
    }


def main() -> None:
    """In a process of its own: what `stage_source` asks for."""

    def stage(arguments: dict[str, Any]) -> None:
        source = SourceFile(**arguments["source"])
        settings = IngestSettings.model_validate(arguments["settings"])
        _read_and_stage(Folder(arguments["folder"]), source, arguments["index"], settings)

    serve(stage)


def _read_and_stage(
    folder: Folder, source: SourceFile, index: int, settings: IngestSettings
) -> StagedSource:
    reader = _SourceReader(source, settings)
    name = staged_name(index)

    def read(sink: Any) -> None:
        """Samples and refusals come out of one reading: the samples' file is written while the
        refusals' is open.
        """
        samples = arrow_writer(reader.tables())
        with reader.refusals.written_to(sink):
            publish_written(folder, f"{name}-samples.arrow", samples)

    try:
        publish_written(folder, f"{name}-refused.arrow", read)
    except (InputError, JobError, MemoryError):
        raise
    except OSError as error:
        raise JobError(f"{source.path}: cannot be read: {error}") from None
    except Exception as error:
        # a reader's bug on bytes nobody thought of: the file must be known at least
        said = f"{type(error).__name__}: {one_line(error)}"
        raise JobError(f"{source.path}: cannot be read ({said}); take this file out") from error
    finally:
        reader.opened.close()
    staged = StagedSource(
        index=index,
        name=source.name,
        bytes=source.bytes,
        modified=source.modified,
        sha256=reader.opened.sha256_read,
        samples=reader.samples,
        images=reader.images,
        refused=dict(reader.refusals.samples),
        refused_captions=reader.refusals.captions,
        ignored=reader.opened.ignored,
        columns=reader.opened.columns,
        named=len(reader.opened.named),
    )
    publish_bytes(folder, f"{name}.json", canonical_json(asdict(staged)).encode())
    return staged


def category(reason: str) -> str:
    """The part of a reason before its details."""
    return reason.partition(":")[0]


class _Refusals:
    """Counts refusals, by category but for captions, and writes them in tables of bounded size."""

    def __init__(self) -> None:
        self.samples: Counter[str] = Counter()
        self.captions = 0
        self._chunk: list[Refusal] = []

    @contextlib.contextmanager
    def written_to(self, sink: Any) -> Iterator[None]:
        """As one Arrow IPC file, whole after the `with` block."""
        with pa.ipc.new_file(
            pa.PythonFile(sink, mode="w"), quarantine_table([]).schema
        ) as self._writer:
            yield
            self._write()

    def add(self, refusal: Refusal) -> None:
        if refusal.what == "caption":
            self.captions += 1
        else:
            self.samples[category(refusal.reason)] += 1
        self._chunk.append(refusal)
        if len(self._chunk) == _CHUNK_ROWS:
            self._write()

    def _write(self) -> None:
        self._writer.write_table(quarantine_table(self._chunk))
        self._chunk = []


class _SourceReader:
    """Counts while it passes accepted samples on in tables of bounded size."""

    def __init__(self, source: SourceFile, settings: IngestSettings) -> None:
        self.source, self.settings = source, settings
        self.fields = FieldNames(
            settings.caption_fields, settings.image_fields, settings.captions_only
        )
        self.checker = SampleChecker(settings, read_class_names(settings.class_names))
        self.opened = OpenedSource(source)
        self.refusals = _Refusals()
        self.samples = self.images = 0

    def tables(self) -> Iterator[pa.Table]:
        chunk: list[tuple[Sample, bytes | None]] = []
        for sample_and_hash in self._checked():
            chunk.append(sample_and_hash)
            if len(chunk) == _CHUNK_ROWS:
                yield _table(chunk)
                chunk = []
        yield _table(chunk)
        self.opened.finish()

    def _checked(self) -> Iterator[tuple[Sample, bytes | None]]:
        for raw in read_source(self.opened, self.fields):
            if isinstance(raw, Refusal):
                self.refusals.add(raw)
                continue
            sample, refusals = self.checker.check(raw, self.source.name, self._has_image(raw))
            for refusal in refusals:
                self.refusals.add(refusal)
            if sample is not None:
                self.samples += 1
                self.images += sample.image is not None
                rows = self.source.kind in _ROWS
                yield (
                    self._keyed(sample),
                    hashlib.sha256(raw.image or b"").digest()[:16] if rows else None,
                )

    def _has_image(self, raw: RawSample) -> bool:
        if self.settings.captions_only:
            return False
        # A tar or a folder is about images; a table or text file has them exactly where its reader
        # found them.
        return raw.reference is not None or self.source.kind in ("tar", "folder")

    def _keyed(self, sample: Sample) -> Sample:
        if self.settings.unique_keys == "corpus":
            return sample
        return Sample(**{**vars(sample), "key": f"{self.source.name}/{sample.key}"})


def _table(chunk: list[tuple[Sample, bytes | None]]) -> pa.Table:
    samples = [sample for sample, _ in chunk]
    columns: Mapping[str, list[Any]] = {
        "key": [s.key for s in samples],
        "key_hash": [hashlib.sha256(s.key.encode("utf-8")).digest()[:16] for s in samples],
        "image_hash": [image_hash for _, image_hash in chunk],
        "captions": [
            [{"text": text, "origin": origin} for text, origin in s.captions] for s in samples
        ],
        "image": [s.image and vars(s.image) for s in samples],
        "width": [s.width for s in samples],
        "height": [s.height for s in samples],
        "bucket": [s.bucket for s in samples],
        "meta": [s.meta for s in samples],
    }
    return pa.table([pa.array(columns[f.name], f.type) for f in STAGED], schema=STAGED)
