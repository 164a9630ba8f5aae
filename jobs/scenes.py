"""`lidit scenes`: a data set whose truth is known."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from jobs.support.start import run
from lidit.errors import InputError


def command(
    out: Annotated[Path, typer.Option(help="Folder for the tars; created.")],
    count: Annotated[int, typer.Option(min=1, help="Number of scenes.")] = 8000,
    size: Annotated[int, typer.Option(min=16, help="Image side in pixels.")] = 32,
    seed: Annotated[int, typer.Option(help="The same seed gives the same bytes.")] = 0,
    per_shard: Annotated[int, typer.Option(min=1, help="Scenes in one tar.")] = 1000,
    layout: Annotated[
        str, typer.Option(help="simple (fixed slots, learned in minutes) or free.")
    ] = "simple",
    style: Annotated[
        list[str] | None,
        typer.Option(
            help="How captions are written, such as photo; again for more. Default: bare."
        ),
    ] = None,
) -> None:
    """Render scenes of coloured shapes with captions and GenEval-style records.

    **Writes** WebDataset tars (KEY.png, KEY.txt, KEY.json) into OUT.

    **Example:** `lidit scenes --out scenes --count 8000 --size 32 --seed 0`
    """
    if re.match(r"[a-z0-9]+:/", str(out)):  # a Path keeps one slash of s3://
        raise InputError(
            f"--out {out}: scenes are written into a local folder; copy the tars to the URL "
            "afterwards"
        )
    from lidit.datasets.scenes.captions import CaptionStyles
    from lidit.datasets.scenes.shards import SceneSet, write_scene_shards
    from pipelines.runtime.progress import ProgressBar

    styles = CaptionStyles(original=tuple(style), synthetic=()) if style else None
    scenes = SceneSet(count, size, seed, layout, per_shard, styles=styles)
    with ProgressBar("scenes", None, "scenes") as progress:
        made = write_scene_shards(out, scenes, progress)
    state = "already there" if made.skipped else "written"
    print(f"{out}: {made.scenes} scenes, {made.distinct_captions} distinct captions, {state}")


if __name__ == "__main__":
    run(command)
