"""A linear probe on a prompt's pooled LLM states: it reads what the model reads.

Shapes: T caption tokens, W width of an LLM, N prompts, D features (all LLMs' widths).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from scipy.special import expit

from lidit.errors import InputError, one_line

FORMAT = "lidit-guard-probe-1"
States = Mapping[str, torch.Tensor]
Vector = NDArray[np.float64]
TENSORS = ("weight", "bias", "threshold")


@dataclass(frozen=True, eq=False)
class Probe:
    """Checker of a prompt's states {encoder name: [T, W]}, as `PromptCache.prompt` gives them.
    Score: probability.

    fingerprints: encoder name -> of the text family whose states are pooled. weight: [D].
    `threshold`: the score from which a prompt is refused, as `lidit guard train` chose it; hand it
    to `Guard`.
    """

    fingerprints: Mapping[str, str]
    weight: Vector
    bias: float
    threshold: float

    @classmethod
    def load(cls, path: Path, fingerprints: Mapping[str, str]) -> Self:
        """Read what `lidit guard train` wrote. `fingerprints`: encoder name -> fingerprint, of the
        model that serves.

        Raises InputError for a missing or damaged file, weights that are not finite, or another
        model's encoders.
        """
        try:
            with safe_open(path, "numpy") as file:
                facts = file.metadata() or {}
                if facts.get("format") != FORMAT:
                    raise InputError(
                        f"{path}: no probe of this version; train it with lidit guard train"
                    )
                trained = json.loads(facts["fingerprints"])
                weight, bias, threshold = (file.get_tensor(name) for name in TENSORS)
        except (OSError, ValueError, LookupError, SafetensorError) as error:
            raise InputError(
                f"{path}: the probe cannot be read ({one_line(error, 200)}); train it with "
                "lidit guard train"
            ) from None
        if trained != dict(fingerprints):
            raise InputError(
                f"{path}: the probe reads the states of other LLMs than the model's; train it again"
            )
        probe = cls(trained, weight.astype(float), float(bias[0]), float(threshold[0]))
        if weight.ndim != 1 or not np.isfinite(weight).all() or not math.isfinite(probe.bias):
            raise InputError(
                f"{path}: the probe's weights are not finite; train it with lidit guard train"
            )
        if not weight.any() or not 0 < probe.threshold <= 1:
            raise InputError(
                f"{path}: the probe would refuse nothing or everything; train it with lidit "
                "guard train"
            )
        return probe

    def save(self, path: Path) -> None:
        """Write the file that `load` reads."""
        facts = {
            "format": FORMAT,
            "fingerprints": json.dumps(dict(self.fingerprints), sort_keys=True),
        }
        tensors = {
            "weight": self.weight,
            "bias": np.array([self.bias]),
            "threshold": np.array([self.threshold]),
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, path, facts)

    @property
    def version(self) -> str:
        """Of weights and LLMs."""
        digest = hashlib.sha256(json.dumps(dict(self.fingerprints), sort_keys=True).encode())
        digest.update(np.concatenate([self.weight, [self.bias]]).tobytes())
        return f"probe-{digest.hexdigest()[:12]}"

    def scores(self, items: Sequence[States]) -> list[float]:
        """Of each prompt. KeyError or ValueError, which close the guard, for states
        of other LLMs.
        """
        pooled = [pool(states, list(self.fingerprints)) for states in items]
        return [float(expit(self.weight @ features + self.bias)) for features in pooled]


def pool(states: States, names: Sequence[str]) -> Vector:
    """A prompt's features [D]: the mean of each LLM's states over the prompt's tokens, one LLM
    after the other.
    """
    means = [
        states[name].detach().float().mean(0).cpu().numpy().astype(float) for name in sorted(names)
    ]
    return np.concatenate(means)
