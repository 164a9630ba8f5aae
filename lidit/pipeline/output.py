"""What a call gives back: images in the form that was asked for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from PIL import Image

from lidit.errors import InputError
from lidit.pixels import unit_to_bytes

OutputType = Literal["pil", "np", "pt", "latent"]


@dataclass(frozen=True, eq=False)
class LIDiTPipelineOutput:
    """Images of one call; it is also a sequence of them: `pipe(prompt)[0]` is the first image.

    Args:
        images: B images: a list of PIL images, an array [B, height, width, 3], a tensor
            [B, 3, height, width], or
            latents [B, C, H, W], as the call's `output_type` says.
    """

    images: Any

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, place: Any) -> Any:
        return self.images[place]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.images)


def check_output_type(output_type: str) -> None:
    """Raises InputError for a form that images cannot be given in."""
    if output_type not in get_args(OutputType):
        raise InputError(
            f"output_type: {output_type!r} is none of {', '.join(get_args(OutputType))}"
        )


def as_images(images: torch.Tensor, output_type: str) -> Any:
    """Images [B, 3, height, width] in [0, 1] in the form that was asked for, on the CPU."""
    images = images.float().clamp(0, 1).cpu()
    if output_type == "pt":
        return images
    if output_type == "np":
        return images.permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(image) for image in image_bytes(images)]


def image_bytes(images: torch.Tensor) -> np.ndarray:
    """Images [B, 3, height, width] in [0, 1] -> uint8 [B, height, width, 3], as files hold them."""
    return np.ascontiguousarray(unit_to_bytes(images.permute(0, 2, 3, 1)).numpy())
