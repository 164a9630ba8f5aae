"""`lidit runs`: the trainings in a folder, and where each stands."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from jobs.support.run_folders import runs_below
from jobs.support.start import run
from lidit.errors import InputError, plain


def command(
    folder: Annotated[
        Path, typer.Argument(help="OUTPUT of trainings, or a folder above it.")
    ] = Path("runs"),
    as_json: Annotated[bool, typer.Option("--json", help="A JSON list instead of lines.")] = False,
) -> None:
    """List the runs below a folder: name, state, step, and the folder.

    **Reads** the runs' own files, never the tracker. **Writes** nothing.

    **Example:** `lidit runs runs`
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; give the OUTPUT of your trainings")
    found = list(runs_below(folder))
    if as_json:
        print(json.dumps([asdict(one) for one in found], indent=1))
        return
    if not found:
        print(f"{folder}: no runs")
        return
    wide = max(len(one.name) for one in found)
    for one in found:
        print(
            f"{one.name:{wide}}  {one.state:8}  step {one.step:,} of {one.steps:,}  "
            f"{plain(one.folder)}"
        )


if __name__ == "__main__":
    run(command)
