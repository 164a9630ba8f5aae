"""Processes of Ray, by what the kernel says of them."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")


@dataclass(frozen=True)
class Process:
    """A process: its number, the name of its program and the words of its command line."""

    pid: int
    name: str
    words: tuple[str, ...]

    def option(self, name: str) -> str | None:
        """The value of `--name=value` on its command line."""
        begin = f"--{name}="
        return next(
            (word.removeprefix(begin) for word in self.words if word.startswith(begin)), None
        )


def children() -> list[Process]:
    """Every child of this process; none on a system without /proc."""
    return [process for parent, process in _processes() if parent == os.getpid()]


def raylets(node_id: str) -> list[Process]:
    """The raylet of a node by its number: a process that somebody else has started, on this
    machine.
    """
    found = [process for _, process in _processes() if process.name == "raylet"]
    return [raylet for raylet in found if raylet.option("node_id") == node_id]


def _processes() -> Iterator[tuple[int, Process]]:
    """Every process that /proc shows, with its parent's number."""
    for folder in PROC.glob("[0-9]*"):
        try:
            # "PID (NAME) STATE PARENT ...", where a name may hold spaces and brackets.
            begin, _, rest = (folder / "stat").read_text().rpartition(")")
            state, parent = rest.split()[:2]
            if state == "Z":
                continue
            words = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")
        except (OSError, ValueError):  # a process that has just ended
            continue
        yield int(parent), Process(int(folder.name), begin.partition("(")[2], tuple(words))


def ray_children() -> list[Process]:
    """The processes of the embedded Ray that this process has started: every one names the
    session's folder.
    """
    mark = f"_{os.getpid()}"
    return [
        child
        for child in children()
        if any("/session_" in word and mark in word for word in child.words)
    ]


def end(lost: list[Process]) -> None:
    """Kill child processes that nobody waits for."""
    for child in lost:
        try:
            os.kill(child.pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
