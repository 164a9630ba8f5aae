"""LI-DiT's networks: what they take and give is in `states`, their sizes in `presets`."""

from lidit.models.conditioner import PromptConditioner
from lidit.models.lidit import LIDiT
from lidit.models.states import PromptCondition, TextStates
from lidit.models.transformer import LIDiTTransformer

__all__ = ["LIDiT", "LIDiTTransformer", "PromptCondition", "PromptConditioner", "TextStates"]
