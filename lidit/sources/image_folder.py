"""A folder of images: captions from x.txt or x.json beside x.png, or from the folder's name as a class label."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from lidit.images.decode import SUFFIXES
from lidit.sources.base import (
    MAX_TEXT_BYTES,
    ORIGINAL,
    BadRecordError,
    FieldNames,
    OpenedSource,
    RawSample,
    captions_in,
    label_in,
    parse_json,
    shown,
)
from lidit.sources.text_files import read_inside
from lidit.store import ImageReference, Refusal


def read_folder(opened: OpenedSource, fields: FieldNames) -> Iterator[RawSample | Refusal]:
    """The images directly in one folder, by name. Links that leave the folder are refused."""
    folder, name = opened.source.path, opened.source.name
    label = Path(folder).name
    paths = sorted(Path(folder).iterdir())
    present = {path.name for path in paths}
    for path in paths:
        if path.suffix.lower().lstrip(".") not in SUFFIXES:
            continue
        key = f"{name}/{path.stem}" if name else path.stem
        file = f"{name}/{path.name}" if name else path.name
        try:
            content = read_inside(folder, path.name)
            opened.hash(path.name.encode("utf-8", "surrogateescape") + b"\0" + content)
            captions: list[tuple[str, str]] = []
            meta = {}
            for beside in (path.with_suffix(".txt"), path.with_suffix(".json")):
                if beside.name not in present:
                    continue
                text = read_inside(folder, beside.name, MAX_TEXT_BYTES)
                opened.hash(text)
                if beside.suffix == ".txt":
                    captions.append((_text(text, beside.name), ORIGINAL))
                    continue
                meta = parse_json(text)
                if not isinstance(meta, dict):
                    raise BadRecordError(f"invalid JSON: {shown(beside.name)} is no object")
                captions += captions_in(meta, fields.captions)
        except BadRecordError as error:
            yield Refusal(key, file, str(error))
            continue
        reference = ImageReference(file, "", 0, len(content))
        image, kept = (None, None) if fields.captions_only else (content, reference)
        yield RawSample(key, tuple(captions), image, kept, label_in(meta) or label, meta)


def _text(content: bytes, name: str) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadRecordError(f"invalid UTF-8: byte {error.start} of {shown(name)}") from None
