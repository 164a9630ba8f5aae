"""`lidit ingest`: image-text data into a corpus."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from jobs.support.options import apart, has_tracker
from jobs.support.start import run
from lidit.errors import InputError

if TYPE_CHECKING:
    from lidit.config import IngestSettings
    from lidit.sources.ingest import IngestSummary


def command(
    source: Annotated[
        list[str],
        typer.Argument(
            help="Folders, files, globs or s3:// addresses; and settings: resolution=512"
        ),
    ],
    corpus: Annotated[str, typer.Option("--corpus", "--out", help="Corpus folder; created.")],
    setting: Annotated[
        list[str] | None, typer.Option("--set", help="The same as a setting without it.")
    ] = None,
) -> None:
    """Read image-text sources into a corpus: units of samples, their distinct captions, and what
    was refused and why.

    **Reads** WebDataset tars and other sources; images stay where they are. **Writes**
    CORPUS/samples, captions, quarantine and, last, corpus.json. The same command again does only
    what is missing; for a finished corpus whose sources have moved, with their new place, it notes
    where they are.

    **Example:** `lidit ingest scenes --corpus corpus resolution=32 bucket_multiple=8`
    """
    from lidit.config import IngestSettings
    from lidit.config.settings import apply_overrides, validate

    sources, words = apart(source)
    settings = validate(
        IngestSettings, apply_overrides({}, [*words, *(setting or [])]), "lidit ingest"
    )
    if not sources:
        raise InputError("lidit ingest: give a folder, a file or an address to read")
    ingest(sources, corpus, settings)


def ingest(sources: list[str], corpus: str, settings: IngestSettings) -> None:
    """Run the ingest with a progress bar and say what came of it, refusals included."""
    from pipelines.corpus.ingest import run_ingest
    from pipelines.runtime.progress import ProgressBar

    with ProgressBar("ingest", None, "files") as progress:
        made = run_ingest(sources, corpus, settings, progress)
    show(corpus, made)
    if has_tracker():
        from pipelines.corpus.tracked import track_ingest

        track_ingest(corpus, settings, made)


def show(corpus: str, made: IngestSummary) -> None:
    """What came of an ingest."""
    from lidit.sources.base import SECOND_DOT

    state = "already there" if made.skipped else f"made in {made.seconds:.0f} s"
    state += f", sources are in {made.moved_to} now" if made.moved_to is not None else ""
    with_images = "" if made.images is None else f" ({made.images} with images)"
    print(
        f"{corpus}: {made.samples} samples{with_images}, {made.captions} captions in "
        f"{made.units} units, {state}"
    )
    for line in made.told:
        print(f"  {line}")
    if made.joined:
        print(f"  joined {made.joined} rows of one key and image: their captions are one sample's")
    for reason, count in made.reasons.items():
        print(f"  refused {count} x {reason} (see {corpus}/quarantine)")
    if made.ignored:
        listed = ", ".join(f"{count} x {kind}" for kind, count in made.ignored.items())
        print(f"  left out {listed}: no part of a sample")
        if any(kind.endswith(SECOND_DOT) for kind in made.ignored):
            print("  a key ends at the first dot of its name: call img.0001.jpg img_0001.jpg")
        if any(" beside " in kind for kind in made.ignored):
            print(
                "  one kind of file is read of each folder: name the others as sources of "
                "their own to read them"
            )


if __name__ == "__main__":
    run(command)
