"""A folder of images: captions from x.txt, x.caption or x.json beside x.png, or its name as a class
label."""

from __future__ import annotations

from collections import defaultdict
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
    hidden_kind,
    label_in,
    parse_json,
    shown,
    suffix_kind,
)
from lidit.sources.columns import note
from lidit.sources.text_files import read_inside
from lidit.store import ImageReference, Refusal

# In the order in which they are read.
TEXT_SUFFIXES = ("txt", "caption", "json")


def read_folder(opened: OpenedSource, fields: FieldNames) -> Iterator[RawSample | Refusal]:
    """The images directly in one folder, by name. Links that leave the folder are refused."""
    folder, name = opened.source.path, opened.source.name
    label = Path(folder).name
    # Hidden files were counted where the folder was found.
    paths = [
        p for p in sorted(Path(folder).iterdir()) if not hidden_kind(p.name) and not p.is_dir()
    ]
    texts = _texts(paths)
    images = [path for path in paths if _suffix(path) in SUFFIXES]
    _count_others(opened, paths, {path.stem for path in images})
    for path in images:
        key = f"{name}/{path.stem}" if name else path.stem
        file = f"{name}/{path.name}" if name else path.name
        beside = texts.get(path.stem, [])
        try:
            content = read_inside(folder, path.name)
            opened.hash(path.name.encode("utf-8", "surrogateescape") + b"\0" + content)
            captions: list[tuple[str, str]] = []
            meta = {}
            for text_path in beside:
                text = read_inside(folder, text_path.name, MAX_TEXT_BYTES)
                opened.hash(text)
                if _suffix(text_path) != "json":
                    captions.append((_text(text, text_path.name), ORIGINAL))
                    continue
                meta = parse_json(text)
                if not isinstance(meta, dict):
                    raise BadRecordError(f"invalid JSON: {shown(text_path.name)} is no object")
                note(
                    opened.columns,
                    {name: value for name, value in meta.items() if name not in fields.images},
                )
                captions += captions_in(meta, fields.captions)
        except BadRecordError as error:
            yield Refusal(key, file, str(error))
            continue
        reference = ImageReference(file, "", 0, len(content))
        image, kept = (None, None) if fields.captions_only else (content, reference)
        members = tuple(suffix_kind(p.name) for p in (path, *beside))
        yield RawSample(key, tuple(captions), image, kept, label_in(meta) or label, meta, members)


def _suffix(path: Path) -> str:
    return path.suffix.lower().lstrip(".")


def _texts(paths: list[Path]) -> dict[str, list[Path]]:
    """Stem -> the texts of an image of that name, in order."""
    found: dict[str, list[Path]] = defaultdict(list)
    for suffix in TEXT_SUFFIXES:
        for path in paths:
            if _suffix(path) == suffix:
                found[path.stem].append(path)
    return found


def _count_others(opened: OpenedSource, paths: list[Path], stems: set[str]) -> None:
    """Count files that are neither an image nor the text of one."""
    for path in paths:
        suffix = _suffix(path)
        if suffix in TEXT_SUFFIXES and path.stem not in stems:
            opened.ignore(f".{suffix} without an image")
        elif suffix not in TEXT_SUFFIXES and suffix not in SUFFIXES:
            opened.ignore(suffix_kind(path.name))


def _text(content: bytes, name: str) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadRecordError(f"invalid UTF-8: byte {error.start} of {shown(name)}") from None
