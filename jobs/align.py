"""`lidit align`: a model learns from rewards of the pictures that it draws itself."""

from __future__ import annotations

from typing import Annotated

import typer

from jobs.support.start import run


def command(
    recipe: Annotated[
        str, typer.Argument(help="Alignment recipe file, or the name of a shipped one: align-demo.")
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Settings to change: start=runs/a/model align.kl=0.1")
    ] = None,
    allow_drift: Annotated[
        bool, typer.Option(help="Continue although settings or data changed.")
    ] = False,
) -> None:
    """Align a trained model with a reward, with Ray Train and DeepSpeed: all weights, or LoRA
    adapters.

    In rounds the model draws pictures of the corpus's captions, which the scene scorer, a function
    or a model behind an address rewards; then it learns from pairs of one caption, the better
    against the worse.

    **Reads** the recipe, the start's model folder, and the corpus it was trained on with its states
    and latents; no LLM unless there are sample prompts or watched ones. **Writes** OUTPUT/NAME as
    `lidit train` does; with `lora` the model is merged, and `model/lora` is the adapter for
    `load_lora_weights`. The same command after a crash goes on from the last checkpoint.

    **Example:** `lidit align align-demo`
    """
    from jobs.train import show
    from lidit.config.shipped import load_alignment

    checked = load_alignment(recipe, overrides)
    from pipelines.training.align import align

    show(align(checked, allow_drift))


if __name__ == "__main__":
    run(command)
