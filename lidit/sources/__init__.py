"""Reading image-text data of unknown origin: every sample comes out, or a refusal says why not."""

from collections.abc import Iterator

from lidit.sources.base import FieldNames, OpenedSource, RawSample, SourceFile
from lidit.sources.expand import expand
from lidit.sources.image_folder import read_folder
from lidit.sources.tables import read_table
from lidit.sources.text_files import read_csv, read_jsonl, read_text
from lidit.sources.webdataset_tar import read_tar
from lidit.store import Refusal

_READERS = {
    "tar": read_tar,
    "table": read_table,
    "jsonl": read_jsonl,
    "csv": read_csv,
    "text": read_text,
    "folder": read_folder,
}


def read_source(opened: OpenedSource, fields: FieldNames) -> Iterator[RawSample | Refusal]:
    """Samples and refusals of one source file, in its order, one at a time."""
    if opened.source.problem is not None:
        return iter([Refusal("", opened.source.name, opened.source.problem, "file")])
    return _READERS[opened.source.kind](opened, fields)


__all__ = ["FieldNames", "OpenedSource", "RawSample", "SourceFile", "expand", "read_source"]
