"""Schedulers and steps that a caller chooses: any scheduler of diffusers that walks an objective's
path.

A model's own schedulers are the objective's. These stand in for them, with the same meaning of a
timestep: t in [0, 1], 0 data and 1 noise.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import SchedulerMixin

from lidit.config import SamplerSettings
from lidit.diffusion.objectives import NoisePrediction, Objective
from lidit.errors import InputError, one_line

TOLERANCE = 1e-4  # of a noise level


@dataclass(frozen=True, eq=False)
class Schedule:
    """What a call says about its steps besides the sampler's settings.

    Args:
        scheduler: One of diffusers, in place of the sampler's.
        timesteps: The steps, in the scheduler's own units (1,000 down to 0).
        sigmas: The steps, as noise levels from 1 down.
    """

    scheduler: Any | None = None
    timesteps: Sequence[float] | None = None
    sigmas: Sequence[float] | None = None

    def prepared(self, objective: Objective, sampler: SamplerSettings) -> Any:
        """A scheduler of its own for one walk, with its steps set.

        Raises InputError for steps that it cannot take, or that do not lead from noise to data.
        """
        if self.timesteps is not None and self.sigmas is not None:
            raise InputError("give either timesteps or sigmas: both say which steps are taken")
        if self.scheduler is None and self.timesteps is None and self.sigmas is None:
            return objective.scheduler(sampler)
        # A scheduler keeps the step and the predictions before it: a call must not find those of
        # another.
        scheduler = (
            objective.scheduler(sampler)
            if self.scheduler is None
            else copy.deepcopy(self.scheduler)
        )
        try:
            scheduler.set_timesteps(**self._steps(scheduler, sampler.steps))
        except (ValueError, TypeError, AssertionError, IndexError) as error:
            raise InputError(
                f"{_name(scheduler)} cannot take these steps ({one_line(error, 200)})"
            ) from None
        _check_levels(objective, scheduler)
        return scheduler

    def _steps(self, scheduler: Any, count: int) -> dict[str, Any]:
        """The arguments of `set_timesteps`; raises InputError where the scheduler chooses its steps
        itself.
        """
        taken = inspect.signature(scheduler.set_timesteps).parameters
        for name, values in (("timesteps", self.timesteps), ("sigmas", self.sigmas)):
            if values is None:
                continue
            if name not in taken:
                raise InputError(
                    f"{_name(scheduler)} takes no {name}; choose another scheduler, or a "
                    "number of steps"
                )
            if not len(values):
                raise InputError(f"{name}: give at least one step")
            return {name: np.array(values, dtype=np.float64)}
        if _flows(scheduler) and "sigmas" in taken:
            # As the model's own: left to itself the scheduler spends its last step on the final
            # thousandth.
            return {"sigmas": np.array([1 - place / count for place in range(count)])}
        return {"num_inference_steps": count}


def check_scheduler(objective: Objective, scheduler: Any) -> None:
    """Raises InputError unless a scheduler of diffusers walks this objective's path from noise to
    data.
    """
    if not isinstance(scheduler, SchedulerMixin):
        raise InputError(f"{_name(scheduler)} is no scheduler of diffusers")
    config: Any = scheduler.config
    flows, prediction = _flows(scheduler), config.get("prediction_type", "epsilon")
    if isinstance(objective, NoisePrediction):
        if flows or prediction != "epsilon":
            raise InputError(
                f"{_name(scheduler)}: the model predicts noise; give a scheduler of "
                "prediction_type epsilon"
            )
        found = getattr(scheduler, "alphas_cumprod", None)
        expected = objective.alphas_cumprod
        if (
            found is None
            or found.shape != expected.shape
            or not torch.allclose(found.cpu(), expected, atol=TOLERANCE)
        ):
            raise InputError(
                f"{_name(scheduler)}: its noise levels are not the model's; "
                "make it with from_config(pipe.scheduler.config)"
            )
    elif not flows:
        raise InputError(
            f"{_name(scheduler)}: the model walks straight from noise to data; give a FlowMatch "
            "scheduler, "
            'or one with use_flow_sigmas=True and prediction_type="flow_prediction"'
        )


def _flows(scheduler: Any) -> bool:
    """Whether it walks x_t = (1 - t) data + t noise by the velocity."""
    config = scheduler.config
    chosen = (
        config.get("use_flow_sigmas", False) and config.get("prediction_type") == "flow_prediction"
    )
    return type(scheduler).__name__.startswith("FlowMatch") or bool(chosen)


def _check_levels(objective: Objective, scheduler: Any) -> None:
    """Raises InputError for steps that go up again or leave [0, 1]: they would draw no picture and
    say nothing.
    """
    levels = objective.sampling_timesteps(scheduler)
    falling = bool((levels.diff() <= TOLERANCE).all())
    if (
        len(levels) != len(scheduler.timesteps)
        or not falling
        or levels.min() < 0
        or levels.max() > 1 + TOLERANCE
    ):
        shown = ", ".join(f"{level:.3g}" for level in levels[:5].tolist())
        raise InputError(
            f"{_name(scheduler)}: its noise levels must fall from at most 1 to 0, found "
            f"{shown}, ..."
        )


def _name(scheduler: Any) -> str:
    return f"scheduler {type(scheduler).__name__}"
