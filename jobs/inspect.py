"""`lidit inspect`: what is in a corpus."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from jobs.support.run_folders import require_corpus
from jobs.support.start import run
from lidit.errors import plain

if TYPE_CHECKING:
    from lidit.store.summary import CorpusSummary


def command(
    corpus: Annotated[str, typer.Argument(help="Corpus folder or s3:// address.")],
    plots: Annotated[
        Path | None,
        typer.Option("--plots", "--out", help="Folder for PNGs: buckets, token lengths, norms."),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object instead of lines.")
    ] = False,
) -> None:
    """Show a corpus: units, samples, captions, refusals, aspect buckets, families with tokens,
    bytes, storage error.

    **Reads** manifests and units; with --plots also states of a few units. **Writes** nothing but
    the plots.

    **Example:** `lidit inspect corpus --plots pictures`
    """
    require_corpus(corpus)
    from lidit.store import Corpus
    from lidit.store.summary import plot_corpus, summarise

    opened = Corpus.open(corpus)
    found, drawn = summarise(opened), plot_corpus(opened, plots) if plots else []
    if as_json:
        print(json.dumps({**asdict(found), "plots": [str(path) for path in drawn]}, indent=1))
    else:
        show(corpus, found, drawn)


def show(corpus: str, found: CorpusSummary, drawn: Sequence[Path]) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console()
    console.print(Text.assemble((plain(corpus), "bold"), f"  digest {found.digest[:12]}"))
    distinct = (
        "" if found.distinct_captions is None else f"{found.distinct_captions:,} of them distinct"
    )
    if found.distinct_captions and found.distinct_captions < found.captions:
        distinct += f", {1 - found.distinct_captions / found.captions:.0%} repeated in other units"
    for name, number, note in (
        ("units", found.units, ""),
        ("samples", found.samples, ""),
        ("captions", found.captions, distinct),
        (
            "refused",
            found.refused,
            f"and {found.refused_captions:,} captions" if found.refused_captions else "",
        ),
    ):
        console.print(f"  {name:<10} {number:>12,}  {note}".rstrip())
    for reason, count in found.reasons.items():
        # A reason may quote a name of an archive: no markup of it is obeyed.
        console.print(f"    refused {count:,} x {plain(reason)}", markup=False, soft_wrap=True)
    if found.buckets:
        listed = sorted(found.buckets.items(), key=lambda bucket: -bucket[1])
        shown = ", ".join(f"{name} {count:,}" for name, count in listed[:8])
        console.print(
            f"  buckets    {shown}{f', and {len(listed) - 8} more' if len(listed) > 8 else ''}"
        )
    for one in found.families:
        state = (
            "complete" if one.complete else f"incomplete, {one.units:,} of {found.units:,} units"
        )
        error = "" if one.storage_error is None else f", rms error {one.storage_error:.4f}"
        console.print(
            f"  {one.kind}/{one.directory}  {state}: {one.rows:,} rows, {one.tokens:,} tokens, "
            f"{one.bytes:,} bytes as "
            f"{one.storage}{error}",
            markup=False,
            soft_wrap=True,  # a table of eight columns would be cut at eighty characters
        )
    for path in drawn:
        console.print(f"plot {plain(str(path))}", markup=False, soft_wrap=True)


if __name__ == "__main__":
    run(command)
