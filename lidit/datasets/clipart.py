"""Open Clip Art: drawings whose titles, keywords and descriptions stand in the SVG each PNG was
made from.
"""

from __future__ import annotations

import html
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from xml.etree import ElementTree

from lidit.datasets.base import Files, LeftOut, Picture, PictureSet
from lidit.datasets.packages import Package

PNG = Package(
    "apt",
    "openclipart-png",
    "1:0.18+dfsg-19",
    "f07f1545a2970c2cf3fa339bc2405da1a95cf2b1827bfa05bf73eb1c20291c02",
)
SVG = Package(
    "apt",
    "openclipart-svg",
    "1:0.18+dfsg-19",
    "989712d90d57dfa3230049f553bb43b76c30ee4d4b8c5f6e106e33f7db5cbdc5",
)
_PNG_FOLDER, _SVG_FOLDER = "usr/share/openclipart/png/", "usr/share/openclipart/svg/"
_COPYRIGHT = "usr/share/doc/openclipart-svg/copyright"
_DC, _RDF, _WORK = (
    "{http://purl.org/dc/elements/1.1/}",
    "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}",
    "Work",
)
# Folders of icon sets, traffic signs and leftovers, and titles that name a collection: captions
# that say nothing.
_LEFT_OUT_FOLDERS = ("computer", "shapes", "signs_and_symbols", "special", "unsorted")
_TITLE_USED_UP = 5


@dataclass(frozen=True)
class _Work:
    title: str
    description: str
    keywords: tuple[str, ...]


def _pictures(files: Files) -> Iterator[Picture | LeftOut]:
    drawings = {
        n.removeprefix(_SVG_FOLDER): c
        for n, c in files[SVG.name].items()
        if n.startswith(_SVG_FOLDER)
    }
    works = {name: _work(content) for name, content in drawings.items()}
    used = Counter(work.title.lower() for work in works.values() if work)
    seen: set[str] = set()
    for name, content in sorted(files[PNG.name].items()):
        if not name.startswith(_PNG_FOLDER):
            continue
        path, origin = name.removeprefix(_PNG_FOLDER).removesuffix(".png"), f"{PNG}/{name}"
        digest = sha256(content).hexdigest()
        work = works.get(f"{path}.svg")
        reason = _reason(path, work, used, digest in seen)
        if reason or work is None:
            yield LeftOut(origin, reason)
            continue
        seen.add(digest)
        captions = [(work.title, "original")]
        if work.keywords:
            captions.append((f"{work.title}: {', '.join(work.keywords)}", "tags"))
        if work.description and work.description != work.title:
            captions.append((work.description, "description"))
        stem = path.rpartition("/")[2].lower()
        yield Picture(
            key=re.sub(r"[^A-Za-z0-9/_-]", "_", path).replace("/", "-"),
            suffix="png",
            content=content,
            captions=tuple(captions),
            ties=(
                f"title {work.title.lower()}",
                f"series {re.sub(r'[-_ ]*[0-9]+[-_]*$', '', stem) or stem}",
            ),
            origin=origin,
            licence="public domain dedication",
            meta={"category": path.rpartition("/")[0]},
        )


def _reason(path: str, work: _Work | None, used: Counter[str], copy: bool) -> str:
    """Why a picture is left out; empty where it is taken."""
    if path.partition("/")[0] in _LEFT_OUT_FOLDERS:
        return "an icon, sign or shape"
    if copy:
        return "the same file under another name"
    if work is None:
        return "no readable SVG beside it"
    if not work.title:
        return "no title"
    return (
        f"one of {_TITLE_USED_UP} or more pictures of this title"
        if used[work.title.lower()] >= _TITLE_USED_UP
        else ""
    )


def _work(content: bytes) -> _Work | None:
    """Title, description and keywords of the drawing itself, not of its authors and publishers."""
    try:
        root = ElementTree.fromstring(content)
    except ElementTree.ParseError:
        return None
    work = next((node for node in root.iter() if node.tag.rpartition("}")[2] == _WORK), None)
    if work is None:
        return None
    keywords = [_text(item) for item in work.iterfind(f"{_DC}subject//{_RDF}li")]
    return _Work(
        _text(work.find(f"{_DC}title")),
        _text(work.find(f"{_DC}description")),
        tuple(dict.fromkeys(word for word in keywords if word)),
    )


def _text(node: ElementTree.Element | None) -> str:
    # Twice: the metadata were escaped before they were put into XML.
    return (
        " ".join(html.unescape(html.unescape(node.text or "")).split()) if node is not None else ""
    )


OPENCLIPART = PictureSet(
    name="openclipart",
    packages=(PNG, SVG),
    wanted=lambda name: (
        (name.startswith((_PNG_FOLDER, _SVG_FOLDER)) and name.endswith((".png", ".svg")))
        or name == _COPYRIGHT
    ),
    pictures=_pictures,
    attribution=(
        "# Open Clip Art 0.18\n\n"
        "- Pictures, titles and keywords: the Open Clip Art Library's contributors, public "
        "domain dedication, from "
        f"{PNG} and {SVG} (Debian).\n"
    ),
)
