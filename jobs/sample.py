"""`lidit sample`: prompts to pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from jobs.support.run_folders import require_model
from jobs.support.start import run


def command(
    model: Annotated[Path, typer.Argument(help="Model folder written by `lidit train`.")],
    prompt: Annotated[list[str], typer.Option(help="What to draw; repeat for several.")],
    out: Annotated[Path, typer.Option(help="Folder for the PNGs.")] = Path("samples"),
    count: Annotated[int, typer.Option(min=1, help="Images per prompt.")] = 4,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the first image of a prompt.")] = 0,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Sampling steps; default: the model's own.")
    ] = None,
    guidance: Annotated[
        float | None, typer.Option(min=0, help="Guidance scale; default: the model's own.")
    ] = None,
    height: Annotated[
        int | None, typer.Option(min=8, help="Pixels; default: the training size.")
    ] = None,
    width: Annotated[
        int | None, typer.Option(min=8, help="Pixels; default: the training size.")
    ] = None,
) -> None:
    """Draw images of prompts with a trained model.

    **Reads** a model folder; loads its LLMs. **Writes** OUT/PPP-SSSS.png (prompt number, seed) and
    OUT/grid.png.

    **Example:** `lidit sample runs/demo/model --prompt "a red circle left of a blue square" --out
    pictures`
    """
    require_model(model)
    from lidit.config.fields import check_prompts, check_seeds
    from lidit.grids import labelled_grid
    from pipelines.evaluation.models import load_pipeline
    from pipelines.runtime.progress import ProgressBar

    check_prompts(prompt, "--prompt")
    check_seeds((seed, seed + count - 1), "--seed")
    pipe = load_pipeline(model, drawing=True)
    out.mkdir(parents=True, exist_ok=True)
    images, labels = [], []
    with ProgressBar("sample", len(prompt) * count, "images") as progress:
        for number, text in enumerate(prompt):
            sampled = pipe(
                [text] * count,
                height=height,
                width=width,
                num_inference_steps=steps,
                guidance_scale=guidance,
                seed=[seed + i for i in range(count)],
            )
            for offset, image in enumerate(sampled.images):
                image.save(out / f"{number:03}-{seed + offset:04}.png")
                images.append(image)
                labels.append(text)
            progress.advance(count)
    labelled_grid(images, labels, columns=count).save(out / "grid.png")
    print(f"{out}: {len(images)} images, and grid.png")


if __name__ == "__main__":
    run(command)
