"""`lidit inspect`: what is in a corpus."""

from __future__ import annotations

from typing import Annotated

import typer

from jobs.start import run


def command(corpus: Annotated[str, typer.Argument(help="Corpus folder.")]) -> None:
    """Show a corpus: units, samples, captions, refusals, families, tokens, bytes.

    **Reads** corpus.json and the families' manifests. **Writes** nothing.

    **Example:** `lidit inspect corpus`
    """
    from rich.console import Console
    from rich.table import Table

    from lidit.store import Corpus

    opened = Corpus.open(corpus)
    totals = opened.facts["totals"]
    console = Console()
    console.print(f"[bold]{corpus}[/bold]  digest {opened.digest[:12]}")
    for name in ("units", "samples", "captions", "refused"):
        console.print(f"  {name:<10} {totals[name]:>12,}")
    for reason, count in totals["reasons"].items():
        console.print(f"    refused {count:,} x {reason}")
    table = Table("family", "state", "units", "rows", "tokens", "bytes", "storage")
    for kind, handles in (("text", opened.text_families()), ("latents", opened.latent_families())):
        for handle in handles:
            if not handle.complete:
                table.add_row(f"{kind}/{handle.directory}", "incomplete", "", "", "", "", "")
                continue
            opening = opened.text_family if kind == "text" else opened.latent_family
            manifest = opening(handle.directory).manifest
            numbers = [f"{manifest[key]:,}" for key in ("units", "rows", "tokens", "bytes")]
            table.add_row(f"{kind}/{handle.directory}", "complete", *numbers, str(handle.spec.get("storage", "")))
    console.print(table)


if __name__ == "__main__":
    run(command)
