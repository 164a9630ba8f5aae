"""From a model and a request to what the step loop works on; whatever cannot be drawn is refused
here.

Shapes: T caption tokens, W width of an LLM.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from lidit.diffusion.guidance import NO_NEGATIVE
from lidit.diffusion.stepper import Caption, Padding, Stepper
from lidit.errors import InputError
from lidit.models import TextStates
from lidit.pipeline import LIDiTPipeline
from lidit.pipeline.inputs import seed_per_image
from lidit.serving.loop import Job
from lidit.serving.request import Request, preview_steps, states_key


def stepper_of(pipeline: LIDiTPipeline, padding: Padding | None = None) -> Stepper:
    """A stepper of the pipeline's model, on the device where the model is."""
    device = pipeline.model.device
    empty = {
        name: entry.collate([entry.empty]).to(device) for name, entry in pipeline.encoders.items()
    }
    return Stepper(pipeline.model, pipeline.objective, empty, padding)


def accept(pipeline: LIDiTPipeline, request: Request) -> Job:
    """The request with the model's defaults filled in. Raises InputError for what the model cannot
    draw.
    """
    sampler = request.sampler.applied(pipeline.sampler)
    pipeline.objective.scheduler(sampler)  # refuses what does not fit the objective
    shape = pipeline.latent_shape(request.height, request.width)
    if not request.seeds:
        raise InputError("a request needs at least one seed, one per image")
    seeds = seed_per_image(list(request.seeds), len(request.seeds))
    if request.negative is not None and pipeline.model.takes_guidance:
        raise InputError(NO_NEGATIVE)
    if request.previews < 0:
        raise InputError(f"{request.previews} previews: give 0 or more")
    return Job(
        _caption(pipeline, request.states),
        sampler,
        seeds,
        shape,
        pixels=shape[1] * shape[2] * pipeline.codec.factor**2,
        preview_steps=preview_steps(sampler.steps, request.previews),
        on_preview=request.on_preview,
        negative=None if request.negative is None else _caption(pipeline, request.negative),
        told=pipeline.model.takes_guidance,
    )


def _caption(pipeline: LIDiTPipeline, given: Mapping[str, torch.Tensor]) -> Caption:
    """A prompt's states on the model's device; raises InputError unless they fit the model."""
    for name, entry in given.items():
        if entry.dim() != 2:
            raise InputError(
                f"encoder {name!r}: states of one prompt are [tokens, width], got "
                f"{list(entry.shape)}"
            )
    # float32 holds what states are stored in exactly, so captions of two dtypes can share a pass.
    states = {name: entry.to(pipeline.model.device, torch.float32) for name, entry in given.items()}
    pipeline.model.conditioner.check(
        {name: TextStates.collate([entry], entry[:0]) for name, entry in states.items()}
    )
    return Caption(states_key(given), states)
