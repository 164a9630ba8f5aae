"""Pixels in their three ranges: 8 bits [0, 255], the networks' [-1, 1] and the unit range [0, 1].

Rounding decides whether files and images are the same to the bit, so the arithmetic stands here
once.
"""

from __future__ import annotations

import torch


def from_bytes(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 -> float32 on [-1, 1]. Raises TypeError for other types: they are no 8-bit pixels."""
    if pixels.dtype != torch.uint8:
        raise TypeError(f"pixels of type {pixels.dtype}, expected uint8")
    return pixels.float().div_(127.5).sub_(1)  # in place: `float` has made a copy


def to_bytes(pixels: torch.Tensor) -> torch.Tensor:
    """[-1, 1] -> uint8, values outside the range cut off; the inverse of `from_bytes`."""
    return to_levels(pixels.float()).clamp(0, 255).to(torch.uint8)


def to_levels(pixels: torch.Tensor) -> torch.Tensor:
    """[-1, 1] -> whole numbers on [0, 255] in the type they have; values outside the range stay
    outside.
    """
    return ((pixels + 1) * 127.5).round()


def to_unit(pixels: torch.Tensor) -> torch.Tensor:
    """[-1, 1] -> float32 on [0, 1], values outside the range cut off."""
    return ((pixels.float() + 1) / 2).clamp(0, 1)


def unit_to_bytes(images: torch.Tensor) -> torch.Tensor:
    """[0, 1] -> uint8, rounded to the nearest."""
    return images.mul(255).round().to(torch.uint8)
