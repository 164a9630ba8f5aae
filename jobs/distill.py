"""`lidit distill`: a student that draws as its teacher does, in fewer evaluations of
the network.
"""

from __future__ import annotations

from typing import Annotated

import typer

from jobs.support.start import run


def command(
    recipe: Annotated[
        str,
        typer.Argument(
            help="Distillation recipe file, or the name of a shipped one: distill-demo."
        ),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Settings to change: teacher=runs/a/model stages.0.train_steps=200"),
    ] = None,
    allow_drift: Annotated[
        bool, typer.Option(help="Continue although settings or data changed.")
    ] = False,
) -> None:
    """Distil a trained model into a student of few steps and no guidance, with Ray Train and
    DeepSpeed.

    A stage of kind `guidance` learns the guided prediction in one evaluation, `progressive` several
    of the teacher's steps in one, `consistency` the same by its own jumps; a stage's teacher is the
    student before it.

    **Reads** the recipe, the teacher's model folder, and the corpus it was trained on with its
    states and latents; no LLM unless there are sample prompts. **Writes** OUTPUT/NAME as
    `lidit train` does, OUTPUT/NAME-stage1 and so on for the stages before the last. The student's
    folder says how it samples: `lidit sample`, `evaluate` and `serve` need no flag. The same
    command after a crash goes on from the last checkpoint.

    **Example:** `lidit distill distill-demo`
    """
    from jobs.train import show
    from lidit.config.shipped import load_distillation

    checked = load_distillation(recipe, overrides)
    from pipelines.training.distill import distill

    for result in distill(checked, allow_drift):
        show(result)


if __name__ == "__main__":
    run(command)
