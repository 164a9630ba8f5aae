"""Prompts of unequal length, with words in common."""

PROMPTS = [
    "a red cube on a blue sphere",
    "a circle",
    "a green square left of the red circle and a cube",
]
