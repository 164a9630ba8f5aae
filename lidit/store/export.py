"""A corpus with its states for teams on other loaders: tars, Parquet or safetensors files, one per
unit.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from safetensors.torch import save

from lidit.errors import InputError
from lidit.progress import SILENT, Progress
from lidit.store.corpus import Corpus
from lidit.store.export_conditions import (
    INDEX,
    SUFFIX,
    require_conditions,
    write_conditions,
    write_index,
)
from lidit.store.families import TextFamily
from lidit.store.files.atomic import (
    TEMPORARY_PREFIX,
    publish_bytes,
    publish_written,
    remove_leftovers,
)
from lidit.store.files.folder import Folder, open_url
from lidit.store.files.owner import MARK, owned
from lidit.store.manifest import spec_differences
from lidit.store.parquet import (
    SHARED_SUFFIX,
    ParquetLayout,
    identity_of,
    pooled_column,
    read_identity,
    shared_table,
    state_columns,
    with_identity,
    write_table,
)
from lidit.store.schema import seal, unseal

SUFFIXES = {"webdataset": "tar", "parquet": "parquet", "diffusers": SUFFIX}
FORMATS = tuple(SUFFIXES)
# readers of a folder of Parquet files pass over names with an underscore in front
EXPORT_FILE = "_export.json"


def export_corpus(
    path: str,
    out: str,
    to: str | ParquetLayout,
    families: Sequence[str] = (),
    images: Callable[[Corpus, int], Iterable[bytes]] | None = None,
    progress: Progress = SILENT,
) -> list[str]:
    """Write a corpus with its states for other loaders: one file per unit.

    A file appears whole or not at all, and a second call skips the files of the first. `out`
    belongs to one corpus, format, choice of families and of images, and layout, which tars'
    _export.json and every Parquet file name.

    A tar holds, per sample, UUUUU_RRRRRR.json (key, captions, metadata), .NAME.safetensors (one
    tensor [tokens, width]
    per caption: "0", "1", ...) and .image. A Parquet file has a row per sample and caption; states
    are lists of vectors [tokens, width]. Beside the folder, OUT.shared.parquet has a row per
    family: the model, its instruction, and the states of the instruction and of the empty caption.
    For diffusers, a safetensors file has the arguments of a pipeline's call for each caption
    (ROW.prompt_embeds), and index.parquet says which row is whose.

    Args:
        path: Folder or URL of the corpus.
        out: Folder or URL to write to: a new one, or that of the same export.
        to: "webdataset", "parquet", "diffusers", or a `ParquetLayout` for Parquet files of another
            dtype or of distinct
            captions.
        families: Text families to include, by name, directory or fingerprint.
        images: Gives the image bytes of a unit's samples in order, to include them: (corpus, unit)
            -> bytes each.
        progress: Counts units.

    Returns:
        The names of all units' files in `out`.

    Raises:
        InputError: An unknown format or family, or `out` holds something else.
    """
    layout = to if isinstance(to, ParquetLayout) else ParquetLayout()
    to = "parquet" if isinstance(to, ParquetLayout) else to
    if to not in FORMATS:
        raise InputError(f"export to {to!r}: choose one of {', '.join(FORMATS)}")
    if images is not None and layout.rows == "captions":
        raise InputError(
            "images belong to samples: export rows per sample, or leave the images out"
        )
    corpus, folder = Corpus.open(path), Folder.at(out)
    opened = [corpus.text_family(name) for name in families]
    if to == "diffusers":
        if images is not None:
            raise InputError(
                "export to diffusers: holds no images; leave --images out, or export to webdataset"
            )
        require_conditions(opened)
    identity = _identity(corpus, to, opened, images is not None)
    if to == "parquet":
        identity |= identity_of(layout, opened)
    with owned(folder, "filled by an export"):
        _claim(folder, identity)
        remove_leftovers(folder)
        written, present = [], folder.sizes()
        if to != "parquet" and EXPORT_FILE not in present:
            publish_bytes(folder, EXPORT_FILE, seal(identity))
        elif to == "parquet" and opened:
            parent, name = _sibling(folder)
            publish_written(
                parent, name, partial(write_table, tables=[shared_table(opened, layout.dtype)])
            )
        progress.expect(corpus.num_units)
        for unit in range(corpus.num_units):
            name = f"{corpus.unit_name(unit)}.{SUFFIXES[to]}"
            if name not in present:
                for family in opened:
                    family.verify_unit(unit)
                contents = list(images(corpus, unit)) if images is not None else None
                if to == "webdataset":
                    content = partial(
                        _write_tar, corpus=corpus, unit=unit, families=opened, images=contents
                    )
                elif to == "diffusers":
                    content = partial(write_conditions, corpus=corpus, unit=unit, families=opened)
                else:
                    table = with_identity(
                        _parquet_table(corpus, unit, opened, contents, layout), identity
                    )
                    content = partial(write_table, tables=[table])
                publish_written(folder, name, content)
            written.append(name)
            progress.update(unit + 1)
        if to == "diffusers" and INDEX not in present:
            publish_written(folder, INDEX, partial(write_index, corpus=corpus))
        return written


def export_states(path: str, file: Path, family: str, layout: ParquetLayout) -> int:
    """Write one family's states of all captions as one Parquet file, and FILE.shared.parquet beside
    it.

    Returns the number of rows. Raises InputError for a missing family, or a file that cannot be in
    that place.
    """
    corpus = Corpus.open(path)
    opened = corpus.text_family(family)
    identity = {**_identity(corpus, "parquet", [opened], False), **identity_of(layout, [opened])}
    units = range(corpus.num_units)
    tables = (
        with_identity(_parquet_table(corpus, unit, [opened], None, layout), identity)
        for unit in units
    )
    folder = Folder.at(file.parent)
    folder.create()
    shared = shared_table([opened], layout.dtype)
    publish_written(folder, file.stem + SHARED_SUFFIX, partial(write_table, tables=[shared]))
    publish_written(folder, file.name, partial(write_table, tables=tables))
    return int(pq.read_metadata(file).num_rows)


def _identity(
    corpus: Corpus, to: str, families: Sequence[TextFamily], images: bool
) -> dict[str, Any]:
    names = [family.name for family in families]
    if len(set(names)) != len(names):
        raise InputError(
            f"families: {', '.join(names)}: two have one name; export them into two folders"
        )
    return {
        "corpus": corpus.digest,
        "format": to,
        "families": {family.name: family.fingerprint for family in families},
        "images": images,
    }


def _claim(folder: Folder, identity: dict[str, Any]) -> None:
    """Make sure that the folder is new or this export's: files of another export would pass for its
    own.
    """
    if folder.local and folder.path.is_file():
        raise InputError(f"{folder.location}: is a file; give a folder for --out")
    folder.create()
    names = {
        name for name in folder.sizes().keys() - {MARK} if not name.startswith(TEMPORARY_PREFIX)
    }
    known = (
        EXPORT_FILE
        if EXPORT_FILE in names
        else next((n for n in sorted(names) if n.endswith(".parquet")), None)
    )
    if known is None:
        if names or folder.folders():
            raise InputError(f"{folder.location}: not empty and no export; give a new folder")
        return
    try:
        existing = (
            unseal(folder.read_bytes(known))
            if known == EXPORT_FILE
            else read_identity(_schema(folder, known))
        )
    except (ValueError, pa.ArrowInvalid):
        where = folder.where(known)
        raise InputError(
            f"{where}: damaged, or not of lidit export; give a new folder or delete this one"
        ) from None
    if differing := spec_differences(existing, identity):
        raise InputError(
            f"{folder.location}: holds another export ({'; '.join(differing)}); give a new folder"
        )


def _schema(folder: Folder, name: str) -> pa.Schema:
    """The schema of a Parquet file, of which only the end is read."""
    if folder.local:
        return pq.read_schema(folder.path / name)
    system, path = open_url(folder.where(name))
    with system.open(path) as file:
        return pq.read_schema(file)


def _sibling(folder: Folder) -> tuple[Folder, str]:
    """The place beside a folder for what all its files share: within it, readers would take it for
    data.
    """
    parent, _, name = folder.location.rpartition("/")
    if not folder.local and parent.count("/") < 2:
        raise InputError(
            f"{folder.location}: give a folder in the bucket, such as {folder.location}/exported"
        )
    return Folder(parent or "/"), name + SHARED_SUFFIX


def _samples(
    corpus: Corpus, unit: int
) -> Iterator[tuple[dict[str, Any], list[int], list[dict[str, str]]]]:
    """Each sample, the rows of its captions, and their texts with origins."""
    texts = corpus.captions(unit)["text"].to_pylist()
    for sample in corpus.samples(unit).to_pylist():
        rows = [reference["index"] for reference in sample["captions"]]
        captions = [{"text": texts[r["index"]], "origin": r["origin"]} for r in sample["captions"]]
        yield sample, rows, captions


def _write_tar(
    sink: Any,
    corpus: Corpus,
    unit: int,
    families: Sequence[TextFamily],
    images: Sequence[bytes] | None,
) -> None:
    with tarfile.open(fileobj=sink, mode="w|", format=tarfile.PAX_FORMAT) as archive:
        for number, (sample, rows, captions) in enumerate(_samples(corpus, unit)):
            # Keys may hold dots and slashes, which mean something else in a tar: the true key is in
            # the json.
            stem = f"{corpus.unit_name(unit)}_{number:06d}"
            record = {
                "key": sample["key"],
                "captions": captions,
                "width": sample["width"],
                "height": sample["height"],
                "bucket": sample["bucket"],
                "meta": json.loads(sample["meta"]),
            }
            _add(archive, f"{stem}.json", json.dumps(record, ensure_ascii=False).encode("utf-8"))
            if images is not None:
                _add(archive, f"{stem}.image", images[number])
            for family in families:
                states = family.read(unit, rows)
                tensors = {str(i): state.contiguous() for i, state in enumerate(states)}
                _add(archive, f"{stem}.{family.name}.safetensors", save(tensors))


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    archive.addfile(info, io.BytesIO(content))


def _parquet_table(
    corpus: Corpus,
    unit: int,
    families: Sequence[TextFamily],
    images: Sequence[bytes] | None,
    layout: ParquetLayout,
) -> pa.Table:
    columns, rows = (_caption_rows if layout.rows == "captions" else _sample_rows)(corpus, unit)
    if images is not None:
        keys = [sample["key"] for sample in corpus.samples(unit).to_pylist()]
        of_key = dict(zip(keys, images, strict=True))
        columns["image"] = pa.array(
            [of_key[key] for key in columns["key"].to_pylist()], pa.large_binary()
        )
    for family in families:
        states, ids = family.read(unit, rows), family.token_ids(unit, rows)
        columns |= state_columns(family.name, states, ids, family.width, layout.dtype)
        # asked of what the family shares: a unit without captions has the column, too
        if (empty := family.shared().empty_pooled) is not None:
            vectors = family.pooled(unit, rows) or []
            columns |= pooled_column(family.name, vectors, len(empty), layout.dtype)
    return pa.table(columns)


def _sample_rows(corpus: Corpus, unit: int) -> tuple[dict[str, pa.Array], list[int]]:
    """A row per sample and caption, and each row's caption among the unit's."""
    flat = [
        (sample, row, c)
        for sample, rows, cs in _samples(corpus, unit)
        for row, c in zip(rows, cs, strict=True)
    ]
    columns = {
        "key": pa.array([sample["key"] for sample, _, _ in flat], pa.large_string()),
        "caption": pa.array([caption["text"] for _, _, caption in flat], pa.large_string()),
        "origin": pa.array([caption["origin"] for _, _, caption in flat], pa.string()),
        "width": pa.array([sample["width"] for sample, _, _ in flat], pa.int32()),
        "height": pa.array([sample["height"] for sample, _, _ in flat], pa.int32()),
        "bucket": pa.array([sample["bucket"] for sample, _, _ in flat], pa.string()),
        "meta": pa.array([sample["meta"] for sample, _, _ in flat], pa.large_string()),
    }
    return columns, [row for _, row, _ in flat]


def _caption_rows(corpus: Corpus, unit: int) -> tuple[dict[str, pa.Array], list[int]]:
    """A row per distinct caption of the unit, with the keys of the samples that have it."""
    texts = corpus.captions(unit)["text"].to_pylist()
    keys: list[list[str]] = [[] for _ in texts]
    for sample, rows, _ in _samples(corpus, unit):
        for row in rows:
            keys[row].append(sample["key"])
    columns = {
        "keys": pa.array(keys, pa.list_(pa.string())),
        "caption": pa.array(texts, pa.large_string()),
    }
    return columns, list(range(len(texts)))
