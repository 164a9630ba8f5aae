"""Tux Paint stamps: photographs and drawings of things, each with a sentence. Letters and signs are
left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from lidit.datasets.base import Files, LeftOut, Picture, PictureSet
from lidit.datasets.packages import Package

STAMPS = Package(
    "apt",
    "tuxpaint-stamps-default",
    "2022.06.04-1",
    "6db6c1bfc870a47f1499d6203b083522eacb57c5f9c87d468f2e92eb6d9d5f34",
)
_FOLDER = "usr/share/tuxpaint/stamps/"
_COPYRIGHT = "usr/share/doc/tuxpaint-stamps-default/copyright"
# frog-1 and frog-2, snail and snail2, tugboat and tugboat_mirror show one thing.
_VARIANT = re.compile(r"(?:_mirror|_flip|[-_]?\d+[a-z]?)+$")


def _pictures(files: Files) -> Iterator[Picture | LeftOut]:
    held = files[STAMPS.name]
    for name, content in sorted(held.items()):
        if not name.startswith(_FOLDER) or not name.endswith(".png"):
            continue
        path, origin = name.removeprefix(_FOLDER).removesuffix(".png"), f"{STAMPS}/{name}"
        folder, _, stem = path.rpartition("/")
        text = held.get(name.removesuffix(".png") + ".txt")
        caption = text.decode("utf-8", "replace").partition("\n")[0].strip() if text else ""
        if folder.startswith("symbols"):
            yield LeftOut(origin, "a letter, digit or sign")
        elif not caption:
            yield LeftOut(origin, "no caption beside it")
        elif "\N{REPLACEMENT CHARACTER}" in caption:
            yield LeftOut(origin, "its caption is not UTF-8")
        else:
            thing = _VARIANT.sub("", stem.lower()) or stem.lower()
            yield Picture(
                key=re.sub(r"[^A-Za-z0-9/_-]", "_", path).replace("/", "-"),
                suffix="png",
                content=content,
                captions=((caption, "original"),),
                ties=(f"caption {caption.lower().rstrip('.!')}", f"thing {thing}"),
                origin=origin,
                licence="GPL-2.0-or-later",
                meta={"category": folder},
            )


TUXPAINT = PictureSet(
    name="tuxpaint-stamps",
    packages=(STAMPS,),
    wanted=lambda name: (
        (name.startswith(_FOLDER) and name.endswith((".png", ".txt"))) or name == _COPYRIGHT
    ),
    pictures=_pictures,
    attribution=(
        "# Tux Paint stamps\n\n"
        "- Pictures and captions: Tux Paint stamps, copyright 2002-2022 Bill Kendrick and "
        "contributors, GPL-2.0-or-"
        f"later, from {STAMPS} (Debian). Whoever passes these files on does so under that "
        "licence.\n"
    ),
)
