"""A family's code from its calibration captions: basis, step and the entropy coder's tables.

Each half of the captions is coded in the basis of the other half, for in its own a basis looks
better than it is. The step is the one that makes the asked error there; the basis that is kept is
the one of all captions.

Legend: N tokens, W width, S symbols.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from lidit.errors import JobError
from lidit.store.coding.rans import MOST_SYMBOLS, TOTAL, Model
from lidit.store.coding.transform import CodeQuality, StateCode, rounded, step_sizes, token_scale

RARE = 1 / 8192  # values that are met less often are escaped
PRIOR_TOKENS = 32.0  # weight of a smooth distribution beside what was counted
CLOSE = 0.002  # relative, of the error that a step makes
BLOCK = 4096  # tokens at once


def fit_code(sample: Sequence[torch.Tensor], error: float) -> StateCode:
    """The code whose rms error is `error` deviations, from standardised states z ([T, W] each) of
    captions.

    Raises JobError for fewer than two captions with a token.
    """
    captions = [z for z in sample if len(z)]
    if len(captions) < 2:
        raise JobError(
            "storage coded needs two captions at least to measure its error; choose int8"
        )
    halves = [torch.cat(captions[0::2]), torch.cat(captions[1::2])]  # [N, W] each
    covariances = [_covariance(z) for z in halves]
    # Components in sizes of their token, each half in the other's basis.
    parts = [z @ _basis(other) for z, other in zip(halves, reversed(covariances), strict=True)]
    components = torch.cat(parts)  # [N, W]
    scale = step_sizes(token_scale(torch.cat(halves)), 1.0)  # [N]
    components.div_(scale[:, None])
    step = _step_for(components, scale, error)
    size = int(rounded(components / step).abs().max()) + 1
    # [W, size] each
    counts = [_count(part, step, size) for part in components.split([len(half) for half in halves])]
    quality = _quality(components, scale, step, counts)
    basis = _basis(covariances[0] + covariances[1])
    return StateCode(basis, step, entropy_model(counts[0] + counts[1]), quality)


def _covariance(z: torch.Tensor) -> torch.Tensor:
    """Sum over tokens of z z' [W, W], float64."""
    total = torch.zeros(z.shape[1], z.shape[1], dtype=torch.float64, device=z.device)
    for block in z.split(BLOCK):
        total += (block.T @ block).double()
    return total


def _basis(covariance: torch.Tensor) -> torch.Tensor:
    """Principal directions [W, W] float32, the widest first."""
    return torch.linalg.eigh(covariance.double()).eigenvectors.flip(1).float().contiguous()


def _step_for(components: torch.Tensor, scale: torch.Tensor, error: float) -> float:
    """The step at which components [N, W], in sizes of tokens whose sizes are `scale` [N], are off
    by `error`.
    """
    step = error * math.sqrt(12)
    for _ in range(12):
        squared = sum(
            float((block - rounded(block / step) * step).square().sum(-1) @ size.square())
            for block, size in zip(components.split(BLOCK), scale.split(BLOCK), strict=True)
        )
        ratio = error / math.sqrt(squared / components.numel())
        step *= ratio
        if abs(ratio - 1) < CLOSE:
            break
    return step


def _count(components: torch.Tensor, step: float, size: int) -> NDArray[np.float64]:
    """How often each magnitude below `size` of each component is met, [W, size]."""
    width = components.shape[1]
    counts = torch.zeros(width * size, dtype=torch.int64, device=components.device)
    first = torch.arange(width, device=components.device) * size
    for block in components.split(BLOCK):
        keys = rounded(block / step).abs_().long() + first
        counts += torch.bincount(keys.reshape(-1), minlength=width * size)
    found: NDArray[np.float64] = counts.view(width, size).double().cpu().numpy()
    return found


def _quality(
    components: torch.Tensor,
    scale: torch.Tensor,
    step: float,
    counts: Sequence[NDArray[np.float64]],
) -> CodeQuality:
    """Of the held-out halves; each is coded with the tables of the other one."""
    squared, worst = 0.0, 0.0
    for block, size in zip(components.split(BLOCK), scale.split(BLOCK), strict=True):
        off = (block - rounded(block / step) * step).square().sum(-1)  # [N], in sizes of the token
        squared += float(off @ size.square())
        worst = max(worst, float((off / block.square().sum(-1).clamp_min(1e-9)).max()))
    bits = sum(
        _bits(part, entropy_model(other))
        for part, other in zip(counts, reversed(counts), strict=True)
    )
    values = components.numel()
    states = 32 / components.shape[1]
    return CodeQuality(bits / values + states, math.sqrt(squared / values), math.sqrt(worst))


def _bits(counts: NDArray[np.float64], model: Model) -> float:
    """Bits of values whose magnitudes are met `counts` [W, size] times."""
    total = 0.0
    for magnitudes, frequencies, radius in zip(
        counts, model.frequencies, model.radius.tolist(), strict=True
    ):
        shares = frequencies / TOTAL
        inside = magnitudes[: radius + 1]
        # One sign stands for both: they are as likely.
        total -= float(inside @ np.log2(shares[radius : radius + len(inside)]))
        total += float(magnitudes[radius + 1 :].sum()) * (16 - math.log2(shares[2 * radius + 1]))
    return total


def entropy_model(counts: NDArray[np.float64]) -> Model:
    """Frequencies from how often each magnitude was met, [W, largest + 1]: either sign is as
    likely.
    """
    reach, tables = [], []
    for magnitudes in counts:
        shares = _smooth(magnitudes)  # of the magnitudes 0, 1, ...
        beyond = 1 - np.cumsum(shares)
        radius = min(int(np.argmax(beyond <= RARE)), MOST_SYMBOLS // 2 - 1)
        halves = shares[1 : radius + 1] / 2
        shares = np.concatenate([halves[::-1], shares[:1], halves, [max(beyond[radius], 0.0)]])
        reach.append(radius)
        tables.append(_whole(shares / shares.sum()))
    found = np.zeros((len(tables), max(len(table) for table in tables)), np.uint16)
    for row, table in zip(found, tables, strict=True):
        row[: len(table)] = table
    return Model(found, np.asarray(reach, np.int16))


def _smooth(magnitudes: NDArray[np.float64]) -> NDArray[np.float64]:
    """Shares of magnitudes, mixed with a two-sided geometric distribution of the same mean."""
    number = np.arange(2 * len(magnitudes) + 8)
    met = np.zeros(len(number))
    met[: len(magnitudes)] = magnitudes
    mean = float((met * number).sum() / met.sum())
    ratio = (math.sqrt(1 + mean * mean) - 1) / mean if mean > 0 else 0.0
    prior = np.where(number > 0, 2.0, 1.0) * ratio**number
    mixed = met + PRIOR_TOKENS * prior / prior.sum()
    return np.asarray(mixed / mixed.sum())


def _whole(shares: NDArray[np.float64]) -> NDArray[np.uint16]:
    """Shares as positive integers that sum to 4096."""
    free = TOTAL - len(shares)
    found = 1 + np.floor(shares * free).astype(np.int64)
    found[np.argmax(found)] += TOTAL - found.sum()
    return found.astype(np.uint16)
