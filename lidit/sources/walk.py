"""A folder of unknown origin walked to its end: every file comes out, or a count says what was left
out and why."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from lidit.sources.base import hidden_kind, shown

READ_ALREADY = "link back to a folder that is read anyway"
NO_ACCESS = "folder that may not be read"


def walk(top: Path) -> tuple[list[Path], dict[str, str]]:
    """(files below `top`, path -> kind of what was left out), both in order.

    Links to folders are followed, each folder once: one that leads to a folder read already, or to
    one that holds `top`, is left out. What systems put there is left out with all that is in it.
    """
    files: list[Path] = []
    left: dict[str, str] = {}
    seen: set[str] = set()
    root = os.path.realpath(top)
    waiting = [str(top)]
    while waiting:
        start = waiting.pop(0)
        target = os.path.realpath(start)
        if target in seen or (start != str(top) and Path(root).is_relative_to(target)):
            left[start] = READ_ALREADY
            continue
        links, found = _walk_real(start, seen, left)
        files += found
        # real folders first, then links in one order: the same files every time
        waiting = sorted([*waiting, *links])
    return sorted(files), dict(sorted(left.items()))


def _walk_real(start: str, seen: set[str], left: dict[str, str]) -> tuple[list[str], list[Path]]:
    """Links to folders, and the files of `start` and its own folders."""
    links: list[str] = []
    files: list[Path] = []

    def refused(error: OSError) -> None:
        left[str(error.filename)] = NO_ACCESS

    for folder, folders, names in os.walk(start, onerror=refused):
        if (real := os.path.realpath(folder)) in seen:
            left[folder] = READ_ALREADY
            folders.clear()
            continue
        seen.add(real)
        for name in names:
            place = Path(folder, name)
            if kind := hidden_kind(name):
                left[str(place)] = kind
            else:
                files.append(place)
        for name in list(folders):
            place = Path(folder, name)
            if kind := hidden_kind(name):
                left[str(place)] = f"{kind}/"
            elif place.is_symlink():
                links.append(str(place))
            else:
                continue
            folders.remove(name)
    return links, files


def problem_of(path: Path, top: Path | None = None) -> str | None:
    """Why a file must not be opened; None where it may. Opening a pipe would wait for ever, a
    device read for ever.

    top: the folder whose walk found the file. What somebody put there may be a link to any file of
    this machine.
    """
    name = shown(path.name)
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        where = f" is a link to {shown(str(path.readlink()))}, which" if path.is_symlink() else ""
        return f"no file: {name}{where} does not exist"
    except OSError as error:
        return f"unreadable file: {name}: {os.strerror(error.errno or 0)}"
    if not stat.S_ISREG(mode):
        return f"not a file: {name} is {special(mode)}"
    if top is None or not path.is_symlink():
        return None
    real = Path(os.path.realpath(path))
    if any(real.is_relative_to(os.path.realpath(folder)) for folder in (top, path.parent)):
        return None
    return (
        f"unsafe name: {name} is a link out of its folder; to read it, name it as a source "
        "of its own"
    )


def special(mode: int) -> str:
    """What a path is that is no regular file, in words."""
    kinds = {stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFDIR: "a folder"}
    return kinds.get(stat.S_IFMT(mode), "a device")
