"""A linear probe on a prompt's pooled LLM states: it reads what the model reads.

Shapes: T caption tokens, W width of an LLM.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

States = Mapping[str, torch.Tensor]


class Probe:
    """Checker of a prompt's states {encoder name: [T, W]}, as `PromptCache.prompt` gives them. Score: probability.

    `threshold`: what `lidit guard train` chose; hand it to `Guard`.
    """

    threshold: float

    @classmethod
    def load(cls, path: Path, fingerprints: Mapping[str, str]) -> Probe:
        """Read what `lidit guard train` wrote. `fingerprints`: encoder name -> fingerprint, of the model that serves.

        Raises InputError for a missing or damaged file, weights that are not finite, or another model's encoders.
        """
        raise NotImplementedError

    def save(self, path: Path) -> None:
        raise NotImplementedError

    @property
    def version(self) -> str:
        raise NotImplementedError

    def scores(self, items: Sequence[States]) -> list[float]:
        raise NotImplementedError
