"""The reward that settings name."""

from __future__ import annotations

import importlib

from lidit.config.align import RewardSettings
from lidit.errors import InputError, one_line
from lidit.evals.rewards.base import Reward
from lidit.evals.rewards.scenes import SceneReward
from lidit.evals.rewards.vqa import VqaReward


def open_reward(settings: RewardSettings) -> Reward:
    """The reward. Raises InputError for a function that is not there."""
    if settings.kind == "scenes":
        return SceneReward(settings)
    if settings.kind == "vqa":
        return VqaReward(settings)
    assert settings.function is not None
    module, _, name = settings.function.partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise InputError(
            f"reward.function: {settings.function} cannot be imported ({one_line(error, 120)}); "
            "install its package "
            "where the trainers run, or put it on PYTHONPATH"
        ) from None
    if not callable(function):
        raise InputError(f"reward.function: {settings.function} is no function")
    reward: Reward = function
    return reward
