"""Emoji of two vendors at 64 pixels, and Microsoft's 3D ones at 256, captioned by emojibase.

Vendor is style: the same label drawn by another hand, which the plain caption names.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass

from lidit.datasets.base import Files, LeftOut, Picture, PictureSet
from lidit.datasets.packages import Package

LABELS = Package(
    "npm",
    "emojibase-data",
    "17.0.0",
    "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a",
)
GOOGLE = Package(
    "npm",
    "emoji-datasource-google",
    "16.0.0",
    "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
)
TWITTER = Package(
    "npm",
    "emoji-datasource-twitter",
    "16.0.0",
    "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877",
)
FLUENT = Package(
    "npm",
    "@lobehub/fluent-emoji-3d",
    "1.1.0",
    "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
)
_DATA, _GROUPS = "en/data.json", "meta/groups.json"

# What differs between near copies: skin tone, presentation, gender, direction. People are drawn in
# three genders.
_SKIN_TONES = {f"1F3F{digit}" for digit in "BCDEF"}
_DROPPED = _SKIN_TONES | {"FE0F", "2640", "2642", "27A1", "200D"}
_ONE_PERSON = {
    "1F468": "1F9D1", "1F469": "1F9D1", "1F466": "1F9D2", "1F467": "1F9D2", "1F474": "1F9D3",
    "1F475": "1F9D3",
    "1F934": "1FAC5", "1F478": "1FAC5", "1F936": "1F385", "1F46B": "1F46D", "1F46C": "1F46D",
}  # fmt: skip
_SAME_SCENE = {
    "1F9D1-2764-1F9D1": "1F491",
    "1F9D1-2764-1F48B-1F9D1": "1F48F",
    "1F9D1-1F91D-1F9D1": "1F46D",
    "1FAF1-1FAF2": "1F91D",
    "1F9D1-1F384": "1F385",
}


@dataclass(frozen=True)
class Style:
    """Where one vendor's files are, how its captions name it, and the licence of its art."""

    package: Package
    folder: str
    suffix: str
    words: str
    licence: str


NOTO = Style(GOOGLE, "img/google/64/", "png", "Noto", "Apache-2.0")
TWEMOJI = Style(TWITTER, "img/twitter/64/", "png", "Twemoji", "CC-BY-4.0")
FLUENT_3D = Style(FLUENT, "assets/", "webp", "Fluent 3D", "MIT")


@dataclass(frozen=True)
class Label:
    text: str
    tags: tuple[str, ...]
    base: str
    category: str


def base_scene(hexcode: str) -> str:
    """One name for an emoji and its variants of skin tone, gender and direction."""
    parts = [part.zfill(4) for part in hexcode.upper().split("-")]
    kept = [_ONE_PERSON.get(part, part) for part in parts if part not in _DROPPED]
    scene = "-".join(kept) or hexcode.upper()
    return _SAME_SCENE.get(scene, scene)


def _wanted(name: str) -> bool:
    folders = tuple(style.folder for style in (NOTO, TWEMOJI, FLUENT_3D))
    return name.startswith(folders) or name in (_DATA, _GROUPS, "LICENSE", "README.md")


def _labels(files: Files) -> dict[str, Label]:
    """By the hexcode in lower case without the presentation selector, as vendors
    name their files.
    """
    table = files[LABELS.name]
    groups = json.loads(table[_GROUPS])["groups"]
    found = {}
    for entry in json.loads(table[_DATA]):
        category = groups.get(str(entry.get("group")), "other")
        for variant in [entry, *entry.get("skins", [])]:
            tags = tuple(entry.get("tags", ()))
            found[_plain(variant["hexcode"])] = Label(
                variant["label"], tags, entry["hexcode"], category
            )
    return found


def _plain(hexcode: str) -> str:
    return hexcode.lower().replace("-fe0f", "")


def _pictures(files: Files, styles: tuple[Style, ...]) -> Iterator[Picture | LeftOut]:
    labels = _labels(files)
    for style in styles:
        for name, content in sorted(files[style.package.name].items()):
            if not name.startswith(style.folder) or not name.endswith(f".{style.suffix}"):
                continue
            stem = name.removeprefix(style.folder).removesuffix(f".{style.suffix}")
            label, origin = labels.get(_plain(stem)), f"{style.package}/{name}"
            if label is None:
                yield LeftOut(origin, "no label in emojibase-data")
                continue
            captions = [(f"{label.text}, {style.words} style", "original")]
            if label.tags:
                captions.append((f"{label.text}: {', '.join(label.tags)}", "tags"))
            yield Picture(
                key=f"{style.words.lower().replace(' ', '-')}-{stem}",
                suffix=style.suffix,
                content=content,
                captions=tuple(captions),
                ties=(base_scene(label.base),),
                origin=origin,
                licence=style.licence,
                meta={"style": style.words, "category": label.category, "hexcode": stem.upper()},
            )


_LABELS_LINE = f"- Labels and tags: {LABELS} (npm), MIT, from Unicode CLDR (Unicode License).\n"

EMOJI = PictureSet(
    name="emoji",
    packages=(LABELS, GOOGLE, TWITTER),
    wanted=_wanted,
    pictures=lambda files: _pictures(files, (NOTO, TWEMOJI)),
    attribution=(
        "# Emoji\n\n"
        f"- Pictures noto-*: Noto Emoji, copyright Google, Apache-2.0, from {GOOGLE} (npm; its "
        "code is MIT).\n"
        "- Pictures twemoji-*: Twemoji, copyright Twitter, Inc and other contributors, CC-BY-4.0 "
        f"(https://creativecommons.org/licenses/by/4.0/), from {TWITTER} (npm; its code is "
        "MIT). The files are "
        "unchanged; whoever shows them, or pictures adapted from them, names Twemoji and the "
        "licence.\n" + _LABELS_LINE
    ),
)

FLUENT_EMOJI = PictureSet(
    name="fluent-emoji",
    packages=(LABELS, FLUENT),
    wanted=_wanted,
    pictures=lambda files: _pictures(files, (FLUENT_3D,)),
    attribution=(
        "# Fluent emoji, 3D\n\n"
        f"- Pictures: Fluent Emoji by Microsoft, from {FLUENT} (npm), which says MIT. "
        "Microsoft's own terms were not "
        "checked: read them before you publish these pictures.\n" + _LABELS_LINE
    ),
)
