"""A corpus with its states for teams on other loaders: WebDataset tars or Parquet files, one per unit."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import save

from lidit.errors import InputError
from lidit.progress import SILENT, Progress
from lidit.store.corpus import Corpus
from lidit.store.families import TextFamily
from lidit.store.files.atomic import TEMPORARY_PREFIX, publish_bytes, publish_written, remove_leftovers
from lidit.store.files.folder import Folder
from lidit.store.files.owner import MARK, owned
from lidit.store.manifest import spec_differences
from lidit.store.schema import seal, unseal

FORMATS = ("webdataset", "parquet")
EXPORT_FILE = "_export.json"  # readers of a folder of Parquet files pass over names with an underscore in front


def export_corpus(
    path: str,
    out: str,
    to: str,
    families: Sequence[str] = (),
    images: Callable[[Corpus, int], Iterable[bytes]] | None = None,
    progress: Progress = SILENT,
) -> list[str]:
    """Write a corpus with its states for other loaders: one WebDataset tar or one Parquet file per unit.

    A file appears whole or not at all, and a second call skips the files of the first. `out` belongs to one corpus,
    format, choice of families and of images, which its _export.json names.

    A tar holds, per sample, UUUUU_RRRRRR.json (key, captions, metadata), .NAME.safetensors (one tensor [tokens, width]
    per caption: "0", "1", ...) and .image. A Parquet file has one row per sample and caption; states are float32,
    row-major, with their width in the schema metadata.

    Args:
        path: Folder or URL of the corpus.
        out: Folder or URL to write to: a new one, or that of the same export.
        to: "webdataset" or "parquet".
        families: Text families to include, by name, directory or fingerprint.
        images: Gives the image bytes of a unit's samples in order, to include them: (corpus, unit) -> bytes each.
        progress: Counts units.

    Returns:
        The names of all units' files in `out`.

    Raises:
        InputError: An unknown format or family, or `out` holds something else.
    """
    if to not in FORMATS:
        raise InputError(f"export to {to!r}: choose one of {', '.join(FORMATS)}")
    corpus, folder = Corpus.open(path), Folder.at(out)
    opened = [corpus.text_family(name) for name in families]
    with owned(folder, "filled by an export"):
        _claim(folder, corpus, to, opened, images is not None)
        remove_leftovers(folder)
        suffix, write = ("tar", _write_tar) if to == "webdataset" else ("parquet", _write_parquet)
        written, present = [], folder.sizes()
        progress.expect(corpus.num_units)
        for unit in range(corpus.num_units):
            name = f"{corpus.unit_name(unit)}.{suffix}"
            if name not in present:
                for family in opened:
                    family.verify_unit(unit)
                contents = list(images(corpus, unit)) if images is not None else None
                content = partial(write, corpus=corpus, unit=unit, families=opened, images=contents)
                publish_written(folder, name, content)
            written.append(name)
            progress.update(unit + 1)
        return written


def _claim(folder: Folder, corpus: Corpus, to: str, families: Sequence[TextFamily], images: bool) -> None:
    """Make the folder this export's, or make sure that it is: files of another export would pass for its own."""
    names = [family.name for family in families]
    if len(set(names)) != len(names):
        raise InputError(f"families: {', '.join(names)}: two have one name; export them into two folders")
    identity = {
        "corpus": corpus.digest,
        "format": to,
        "families": {family.name: family.fingerprint for family in families},
        "images": images,
    }
    if folder.local and folder.path.is_file():
        raise InputError(f"{folder.location}: is a file; give a folder for --out")
    folder.create()
    try:
        existing = unseal(folder.read_bytes(EXPORT_FILE))
    except FileNotFoundError:
        if folder.folders() or any(not name.startswith(TEMPORARY_PREFIX) for name in folder.sizes().keys() - {MARK}):
            raise InputError(f"{folder.location}: not empty and without {EXPORT_FILE}; give a new folder") from None
        publish_bytes(folder, EXPORT_FILE, seal(identity))
        return
    except ValueError:
        raise InputError(f"{folder.where(EXPORT_FILE)}: damaged; give a new folder or delete this one") from None
    if differing := spec_differences(existing, identity):
        raise InputError(f"{folder.location}: holds another export ({'; '.join(differing)}); give a new folder")


def _samples(corpus: Corpus, unit: int) -> Iterator[tuple[dict[str, Any], list[int], list[dict[str, str]]]]:
    """Each sample, the rows of its captions, and their texts with origins."""
    texts = corpus.captions(unit)["text"].to_pylist()
    for sample in corpus.samples(unit).to_pylist():
        rows = [reference["index"] for reference in sample["captions"]]
        captions = [{"text": texts[r["index"]], "origin": r["origin"]} for r in sample["captions"]]
        yield sample, rows, captions


def _write_tar(
    sink: Any, corpus: Corpus, unit: int, families: Sequence[TextFamily], images: Sequence[bytes] | None
) -> None:
    with tarfile.open(fileobj=sink, mode="w|", format=tarfile.PAX_FORMAT) as archive:
        for number, (sample, rows, captions) in enumerate(_samples(corpus, unit)):
            # Keys may hold dots and slashes, which mean something else in a tar: the true key is in the json.
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


def _write_parquet(
    sink: Any, corpus: Corpus, unit: int, families: Sequence[TextFamily], images: Sequence[bytes] | None
) -> None:
    found = list(_samples(corpus, unit))
    flat = [(n, s, row, c) for n, (s, rows, cs) in enumerate(found) for row, c in zip(rows, cs, strict=True)]
    columns: dict[str, pa.Array] = {
        "key": pa.array([sample["key"] for _, sample, _, _ in flat], pa.large_string()),
        "caption": pa.array([caption["text"] for _, _, _, caption in flat], pa.large_string()),
        "origin": pa.array([caption["origin"] for _, _, _, caption in flat], pa.string()),
        "width": pa.array([sample["width"] for _, sample, _, _ in flat], pa.int32()),
        "height": pa.array([sample["height"] for _, sample, _, _ in flat], pa.int32()),
        "bucket": pa.array([sample["bucket"] for _, sample, _, _ in flat], pa.string()),
        "meta": pa.array([sample["meta"] for _, sample, _, _ in flat], pa.large_string()),
    }
    if images is not None:
        columns["image"] = pa.array([images[n] for n, _, _, _ in flat], pa.large_binary())
    for family in families:
        states = family.read(unit, [row for _, _, row, _ in flat])
        columns[f"{family.name}_tokens"] = pa.array([len(state) for state in states], pa.int32())
        columns[f"{family.name}_states"] = _float_lists(states)
    table = pa.table(columns)
    widths = {family.name: family.width for family in families}
    table = table.replace_schema_metadata({"lidit": json.dumps({"width": widths}, sort_keys=True)})
    pq.write_table(table, pa.PythonFile(sink, mode="w"), compression="zstd")


def _float_lists(states: Sequence[torch.Tensor]) -> pa.LargeListArray:
    offsets = np.cumsum([0, *(state.numel() for state in states)], dtype=np.int64)
    flat = torch.cat([state.float().reshape(-1) for state in states]) if states else torch.zeros(0)
    return pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(flat.numpy()))
