"""`lidit pictures`: real captioned pictures from package registries."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from jobs.support.start import run
from lidit.errors import InputError


def command(
    name: Annotated[
        str, typer.Argument(help="emoji, fluent-emoji, tuxpaint-stamps or openclipart.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for tars, licences and attribution; created.")],
    held_out: Annotated[
        float, typer.Option(min=0, max=0.9, help="Share of the motifs kept out of train/.")
    ] = 0.1,
    packages: Annotated[
        Path | None, typer.Option(help="Folder with packages fetched before; filled.")
    ] = None,
) -> None:
    """Fetch a captioned picture set with npm or apt, check it, and write it as tars in two parts.

    Variants of one motif (skin tones, genders, numbered copies) are all in train/ or all in
    held_out/. No script of a package is run.

    **Writes** OUT/train and OUT/held_out (KEY.png or KEY.webp, KEY.txt, KEY.json),
    OUT/ATTRIBUTION.md, OUT/licences.

    **Example:** `lidit pictures emoji --out emoji`
    """
    from lidit.datasets import SETS, write_picture_set
    from pipelines.runtime.progress import ProgressBar

    if name not in SETS:
        raise InputError(f"{name!r}: no such picture set; there are {', '.join(SETS)}")
    with ProgressBar(f"pictures {name}", None, "packages") as progress:
        made = write_picture_set(SETS[name], out, held_out, packages, progress)
    counts = ", ".join(f"{count} in {part}" for part, count in made.pictures.items())
    print(f"{out}: {counts}, {'already there' if made.skipped else 'written'}")
    for reason, count in sorted(made.left_out.items(), key=lambda item: -item[1]):
        print(f"  left out: {count} x {reason}")
    print(f"  licences: {out / 'ATTRIBUTION.md'}")


if __name__ == "__main__":
    run(command)
