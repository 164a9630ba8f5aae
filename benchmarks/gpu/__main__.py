"""All parts of benchmarks/gpu.md on one GPU within eight minutes, or the same at toy size on a CPU.

    python -m benchmarks.gpu [--parts 2,4] [--seconds 480] [--out FILE]
    python -m benchmarks.gpu --dry-run

Every figure is one JSON line as soon as it is known, every part one more with all of its figures; a
table ends it.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.parts import PARTS, Part
from benchmarks.gpu.process import PartProcess, load

LEAST = 4.0  # seconds with which a part is still begun


def numbers(text: str) -> list[int]:
    known = {part.number for part in PARTS}
    try:
        chosen = [int(number) for number in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r}: give numbers with commas between them, such as 2,4"
        ) from None
    if wrong := sorted(set(chosen) - known):
        raise argparse.ArgumentTypeError(
            f"no part {', '.join(map(str, wrong))}; parts are {sorted(known)}"
        )
    return chosen


def arguments_of(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--parts", type=numbers, help="numbers with commas between them; default: all, by worth"
    )
    parser.add_argument(
        "--seconds",
        type=float,
        help="for everything: later parts are cut; default 480, dry run 110",
    )
    parser.add_argument("--out", type=Path, help="file to which the JSON lines are added")
    parser.add_argument("--dry-run", action="store_true", help="toy sizes on the CPU")
    parser.add_argument(
        "--fresh", action="store_true", help="a fresh process per part in a dry run too"
    )
    return parser.parse_args(given)


class Printer:
    """JSON lines on standard output, and in a file."""

    def __init__(self, file: Path | None) -> None:
        self.file = file

    def __call__(self, found: dict[str, Any]) -> None:
        line = json.dumps(found)
        print(line, flush=True)
        if self.file is not None:
            with self.file.open("a") as stream:
                stream.write(line + "\n")


def run_parts(
    parts: Sequence[Part], arguments: argparse.Namespace, ends: float
) -> list[dict[str, Any]]:
    """Each part's line. While a part measures, the next one's process is importing."""
    say = Printer(arguments.out)
    toy = arguments.dry_run
    method: Any = "fork" if toy and not arguments.fresh else "spawn"
    if method == "fork":
        for part in parts:
            load(part)  # once, for all that are forked
    device = "cpu" if toy else "cuda"
    waiting = [PartProcess(part, device, toy, method) for part in parts[:1]]
    lines: list[dict[str, Any]] = []
    try:
        for number, part in enumerate(parts):
            waiting += [
                PartProcess(following, device, toy, method)
                for following in parts[number + 1 : number + 2]
            ]
            if ends - time.monotonic() < LEAST:
                line = {
                    "part": part.number,
                    "title": part.title,
                    "status": "no time left",
                    "seconds": 0,
                    "figures": [],
                }
            else:
                line = waiting[0].run(
                    ends, lambda found, part=part: say({"part": part.number, "partial": found})
                )
            waiting.pop(0).stop()
            say(line)
            lines.append(line)
    finally:
        for process in waiting:
            process.stop()
    return lines


def table(lines: Sequence[dict[str, Any]]) -> str:
    """A Markdown table of the parts: how each ended, and its figures in a few words."""
    rows = ["| part | seconds | ended | figures |", "|---|---|---|---|"]
    for line in lines:
        words = "; ".join(found["headline"] for found in line["figures"] if "headline" in found)
        failed = [found["name"] for found in line["figures"] if "failed" in found]
        ended = line["status"] + (f", without {'; '.join(failed)}" if failed else "")
        rows.append(f"| {line['part']} {line['title']} | {line['seconds']} | {ended} | {words} |")
    return "\n".join(rows)


def main(given: Sequence[str] | None = None) -> None:
    began = time.monotonic()
    arguments = arguments_of(given)
    parts = [part for part in PARTS if arguments.parts is None or part.number in arguments.parts]
    ends = began + (arguments.seconds or (110 if arguments.dry_run else 480))
    lines = run_parts(parts, arguments, ends)
    print(table(lines))
    # A dry run is there to find what is wrong, so it must not end well with anything wrong.
    wrong = any(
        line["status"] != "done" or any("failed" in found for found in line["figures"])
        for line in lines
    )
    sys.exit(1 if arguments.dry_run and wrong else 0)


if __name__ == "__main__":
    main()
