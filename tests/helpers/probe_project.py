"""A working directory with a real job in it, for the tests of submitting."""

from __future__ import annotations

from pathlib import Path

# The pause is the job's work: tests watch it, or stop it, while it is at it.
PROBE = """
import sys, time
settings = dict(line.split(": ") for line in open(sys.argv[1]).read().splitlines())
with open(settings["runs"], "a") as file:
    file.write("run\\n")
for i in range(int(settings["lines"])):
    print(f"line {i}", flush=True)
    time.sleep(float(settings["pause"]))  # the job's work
sys.exit(int(settings["exit"]))
"""


def make_project(folder: Path, **settings: object) -> Path:
    """A working directory with a real job in it: prints lines, counts its runs in a file, exits as
    told.
    """
    (folder / "jobs").mkdir(parents=True, exist_ok=True)
    (folder / "jobs" / "__init__.py").touch()
    (folder / "jobs" / "probe.py").write_text(PROBE)
    values = {
        "lines": 3,
        "pause": 0,
        "exit": 0,
        "runs": folder.parent / f"{folder.name}-runs.txt",
    } | settings
    (folder / "recipe.yaml").write_text(
        "\n".join(f"{key}: {value}" for key, value in values.items())
    )
    return folder
