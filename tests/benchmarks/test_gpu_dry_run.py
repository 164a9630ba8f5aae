"""What a GPU's time is spent on has run on a CPU before, and one part's end is not the others'."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu.parts import PARTS

ROOT = Path(__file__).parents[2]

# A bare GPU box has none of these three.
BARE = """
import sys
for name in ("ray", "deepspeed", "mlflow"):
    sys.modules[name] = None
from benchmarks.gpu.__main__ import main
main(["--dry-run", "--seconds", "500", "--out", sys.argv[1]])
"""

ENDS = """
import os, sys, threading, time, types
from benchmarks.gpu import __main__ as command
from benchmarks.gpu.parts import Part


def hangs(run):
    run.report("before")
    threading.Event().wait()


def fails(run):
    raise ValueError("of no use")


def tries(run):
    run.attempt("broken", lambda: {}["key"])
    run.report("after")


works = {"hangs": hangs, "crashes": lambda run: os._exit(7), "fails": fails, "tries": tries}
parts = []
for number, (name, work) in enumerate(works.items()):
    module = types.ModuleType(name)
    setattr(module, f"part_{number}", work)
    sys.modules[f"benchmarks.gpu.{name}"] = module
    parts.append(Part(number, name, name, command.LEAST if work is hangs else 60))
ends = time.monotonic() + 200
command.run_parts(parts, command.arguments_of(["--dry-run"]), ends)
command.run_parts(parts[:1], command.arguments_of(["--dry-run"]), time.monotonic() + command.LEAST / 2)
"""  # noqa: E501


def python(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", script, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


def lines_of(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines() if line.startswith("{")]


@pytest.mark.slow
def test_every_part_runs_on_a_bare_box(tmp_path: Path) -> None:
    file = tmp_path / "figures.jsonl"
    done = python(BARE, str(file))
    found = lines_of(done.stdout)
    parts = {line["part"]: line for line in found if "partial" not in line}
    assert {number: line["status"] for number, line in parts.items()} == {
        part.number: "done" for part in PARTS
    }
    failed = [figure for line in parts.values() for figure in line["figures"] if "failed" in figure]
    assert failed == []
    assert done.returncode == 0, done.stderr[-2000:]
    assert lines_of(file.read_text()) == found
    # The figures that say what to mend next.
    kernels = next(
        figure for figure in parts[2]["figures"] if figure.get("name") == "compiled, kernels"
    )
    assert len(kernels["top"]) == 10
    assert {"name", "ms", "share"} <= set(kernels["top"][0])
    table = [line for line in done.stdout.splitlines() if line.startswith("|")]
    assert len(table) == 2 + len(PARTS)


def test_a_part_that_hangs_crashes_or_fails_ends_alone_and_what_it_found_stays() -> None:
    done = python(ENDS)
    lines = [line for line in lines_of(done.stdout) if "partial" not in line]
    assert [line["status"] for line in lines] == [
        "ended after 4 s",
        "crashed, exit code 7",
        "failed: ValueError: of no use",
        "done",
        "no time left",
    ]
    assert lines[0]["figures"] == [{"name": "before"}]
    assert lines[3]["figures"][0]["failed"] == "KeyError: 'key'"
    assert lines[3]["figures"][1] == {"name": "after"}
