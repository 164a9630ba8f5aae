"""`lidit report`: runs side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from jobs.support.start import run


def command(
    runs: Annotated[
        list[Path], typer.Argument(help="Two or more run folders, OUTPUT/NAME of `lidit train`.")
    ],
    prompt: Annotated[
        list[str] | None, typer.Option(help="What every model draws; default: sample prompts.")
    ] = None,
    seeds: Annotated[
        int, typer.Option("--seeds", "--count", min=1, help="Images per prompt: seeds 0, 1, ...")
    ] = 3,
    out: Annotated[Path, typer.Option(help="The page.")] = Path("report.html"),
) -> None:
    """Compare runs on one page: same prompts and seeds, scores, curves, and the settings that
    differ.

    Scores of other weights or another sampler than the model has now are left out, and the page
    says so.

    **Reads** run folders, their evaluations and the tracker; loads their LLMs. **Writes** one HTML
    file that opens offline, and nothing to the tracker.

    **Example:** `lidit report runs/small runs/large --prompt "a red circle above a blue square"`
    """
    from lidit.config.fields import check_prompts
    from pipelines.evaluation.compare import compare_runs

    check_prompts(prompt or (), "--prompt")
    print(compare_runs(runs, prompt or [], range(seeds), out))


if __name__ == "__main__":
    run(command)
