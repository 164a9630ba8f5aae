"""What a caller does between two steps: look at the latents, change them, or end the walk."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback

from lidit.errors import InputError

# pipeline, step number, the scheduler's timestep, tensors by name -> the tensors that change
OnStep = Callable[
    [Any, int, torch.Tensor, dict[str, torch.Tensor]], Mapping[str, torch.Tensor] | None
]
TENSORS = ("latents",)


@dataclass(frozen=True)
class StepCallback:
    """A function as diffusers calls it after each step, and the tensors that it wants to see."""

    function: OnStep | PipelineCallback | MultiPipelineCallbacks
    tensors: tuple[str, ...]

    @classmethod
    def of(
        cls,
        function: OnStep | PipelineCallback | MultiPipelineCallbacks | None,
        tensors: Sequence[str],
    ) -> StepCallback | None:
        """None where nothing is called. Raises InputError for a tensor that this pipeline does not
        show.
        """
        if function is None:
            return None
        if isinstance(function, PipelineCallback | MultiPipelineCallbacks):
            tensors = function.tensor_inputs
        if unknown := [name for name in tensors if name not in TENSORS]:
            raise InputError(
                f"callback_on_step_end_tensor_inputs: {', '.join(unknown)}: a callback can have "
                f"{', '.join(TENSORS)}"
            )
        return cls(function, tuple(tensors))

    def __call__(
        self, pipeline: Any, number: int, timestep: torch.Tensor, latents: torch.Tensor
    ) -> torch.Tensor:
        """The latents to go on with: as they were, or as the function changed them."""
        shown = {"latents": latents} if "latents" in self.tensors else {}
        changed = self.function(pipeline, number, timestep, shown) or {}
        found: torch.Tensor = changed.get("latents", latents)
        if found.shape != latents.shape:
            raise InputError(f"callback_on_step_end gave latents of shape {tuple(found.shape)}")
        return found.to(latents)
