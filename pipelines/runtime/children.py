"""Processes that this process has started: Ray's, by what the kernel says of them."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")


@dataclass(frozen=True)
class Child:
    """A child process: its number, the name of its program and the words of its command line."""

    pid: int
    name: str
    words: tuple[str, ...]

    def option(self, name: str) -> str | None:
        """The value of `--name=value` on its command line."""
        begin = f"--{name}="
        return next((word.removeprefix(begin) for word in self.words if word.startswith(begin)), None)


def children() -> list[Child]:
    """Every child of this process; none on a system without /proc."""
    found = []
    for folder in PROC.glob("[0-9]*"):
        try:
            # "PID (NAME) STATE PARENT ...", where a name may hold spaces and brackets.
            begin, _, rest = (folder / "stat").read_text().rpartition(")")
            state, parent = rest.split()[:2]
            if int(parent) != os.getpid() or state == "Z":
                continue
            words = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")
        except (OSError, ValueError):  # a process that has just ended
            continue
        found.append(Child(int(folder.name), begin.partition("(")[2], tuple(words)))
    return found


def ray_children() -> list[Child]:
    """The processes of the embedded Ray that this process has started: every one names the session's folder."""
    mark = f"_{os.getpid()}"
    return [child for child in children() if any("/session_" in word and mark in word for word in child.words)]


def end(lost: list[Child]) -> None:
    """Kill child processes that nobody waits for."""
    for child in lost:
        try:
            os.kill(child.pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
