"""Named sizes, and how many parameters they have (docs/model.md has the table).

S, B and L are DiT's; 1B and 10B are the paper's table 7; tiny is for 32-pixel images on two CPU
cores.
"""

from __future__ import annotations

from dataclasses import dataclass

from lidit.config import ModelSettings


@dataclass(frozen=True)
class Shape:
    width: int
    depth: int
    heads: int
    patch_size: int


PRESETS = {
    "tiny": Shape(width=96, depth=4, heads=4, patch_size=8),
    "S": Shape(width=384, depth=12, heads=6, patch_size=2),
    "B": Shape(width=768, depth=12, heads=12, patch_size=2),
    "L": Shape(width=1024, depth=24, heads=16, patch_size=2),
    "1B": Shape(width=1152, depth=28, heads=16, patch_size=2),
    "10B": Shape(width=2816, depth=48, heads=44, patch_size=2),
}


def resolve_shape(settings: ModelSettings) -> Shape:
    """The preset's shape with the single values of `settings` put over it."""
    preset = PRESETS[settings.preset]
    return Shape(
        width=settings.width or preset.width,
        depth=settings.depth or preset.depth,
        heads=settings.heads or preset.heads,
        patch_size=settings.patch_size or preset.patch_size,
    )
