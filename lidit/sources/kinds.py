"""Which reader takes a file, by its name."""

from __future__ import annotations

# In a folder the first kind found is taken: a .parquet or .json beside tars describes them, as
# img2dataset does.
KINDS = {
    "tar": (".tar", ".tar.gz", ".tgz"),
    "table": (".parquet", ".pq", ".arrow", ".feather", ".ipc"),
    "jsonl": (".jsonl", ".ndjson"),
    "csv": (".csv", ".tsv"),
    "text": (".txt",),
}
FOLDER = "folder"


def kind_of(path: str) -> str | None:
    """The kind of reader a file name asks for."""
    lower = path.lower()
    return next((kind for kind, suffixes in KINDS.items() if lower.endswith(suffixes)), None)
