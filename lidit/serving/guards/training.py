"""Training the probe on labelled prompts, and the rates at which it is right on prompts it has not
seen.

Shapes: N prompts, D features.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, stats
from scipy.special import expit

from lidit.config.fields import check_prompts
from lidit.errors import InputError
from lidit.pipeline.model_encoder import ModelEncoder
from lidit.serving.guards.normalise import fold, words
from lidit.serving.guards.probe import Probe, Vector, pool

LEAST = 20  # prompts of a label, in training and held out together
HELD_OUT = 4  # of every so many prompts one is held out
FOLDS = 5
STRENGTHS = (1.0, 10.0, 100.0, 1000.0)  # of the pull of weights towards zero
BATCH = 32
Flags = NDArray[np.bool_]


@dataclass(frozen=True)
class Labelled:
    """A prompt, and whether it has to be refused."""

    prompt: str
    refuse: bool


@dataclass(frozen=True)
class Rate:
    """A share with its 95 % interval (Wilson)."""

    hits: int
    of: int

    def __str__(self) -> str:
        interval = stats.binomtest(self.hits, self.of).proportion_ci(method="wilson")
        return (
            f"{self.hits} of {self.of}, {self.hits / self.of:.1%} [{interval.low:.1%}, "
            f"{interval.high:.1%}]"
        )


@dataclass(frozen=True)
class Trained:
    """refused: of the held-out prompts that have to be. blocked: of those that do not. separation:
    area under the curve (AUC), 0.5 is chance.
    """

    probe: Probe
    trained_on: int
    refused: Rate
    blocked: Rate
    separation: float


def read_labelled(path: Path) -> list[Labelled]:
    """The prompts of a JSON-lines file, {"prompt": text, "refuse": true or false}. InputError names
    the bad line.
    """
    try:
        lines = path.read_text("utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"{path}: cannot be read ({type(error).__name__}); give a UTF-8 file of JSON lines"
        ) from None
    found = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            found.append(_labelled(line, f"{path}: line {number}"))
    for refuse in (True, False):
        count = len({_group(one.prompt) for one in found if one.refuse is refuse})
        if count < LEAST:
            label = "true" if refuse else "false"
            raise InputError(
                f"{path}: {count} different prompts with refuse {label}; at least {LEAST} "
                "are needed"
            )
    return found


def train_probe(
    labelled: Sequence[Labelled], encoders: Mapping[str, ModelEncoder], most_blocked: float = 0.01
) -> Trained:
    """Train on three quarters of the prompts, measure on the others.

    The threshold is the lowest that blocks at most `most_blocked` of the harmless training prompts,
    as seen in cross-validation. Spellings of one prompt stay on one side.
    """
    if not 0 < most_blocked < 1:
        raise InputError(
            f"{most_blocked}: the share of harmless prompts that may be blocked is between 0 and 1"
        )
    names = sorted(encoders)
    features = _features([one.prompt for one in labelled], encoders, names)
    refuse = np.array([one.refuse for one in labelled])
    groups = np.array([_group(one.prompt) for one in labelled])
    held_out = _held_out(groups, refuse)
    strength, scores = _best_strength(features[~held_out], refuse[~held_out], groups[~held_out])
    threshold = _threshold(scores[~refuse[~held_out]], most_blocked)
    weight, bias = fit(features[~held_out], refuse[~held_out], strength)
    probe = Probe({name: encoders[name].fingerprint for name in names}, weight, bias, threshold)
    scores, truth = expit(features[held_out] @ weight + bias), refuse[held_out]
    flagged = scores >= threshold
    return Trained(
        probe,
        trained_on=int((~held_out).sum()),
        refused=Rate(int(flagged[truth].sum()), int(truth.sum())),
        blocked=Rate(int(flagged[~truth].sum()), int((~truth).sum())),
        separation=separation(scores, truth),
    )


def fit(features: NDArray[np.float64], refuse: Flags, strength: float) -> tuple[Vector, float]:
    """Logistic regression: weight [D] and bias for features [N, D] as they are. Both labels weigh
    the same.

    The pull towards zero acts on standardised features: an LLM has channels a hundred times as
    large as others.
    """
    mean, std = features.mean(0), features.std(0) + 1e-6
    scaled = (features - mean) / std
    sign = np.where(refuse, 1.0, -1.0)
    share = np.where(refuse, 0.5 / refuse.sum(), 0.5 / (~refuse).sum())

    def loss(parameters: Vector) -> tuple[float, Vector]:
        margin = sign * (scaled @ parameters[:-1] + parameters[-1])
        pull = strength / len(features)
        slope = -share * sign * expit(-margin)
        gradient = np.append(slope @ scaled + pull * parameters[:-1], slope.sum())
        value = share @ np.logaddexp(0, -margin) + pull / 2 * parameters[:-1] @ parameters[:-1]
        return float(value), gradient

    found = optimize.minimize(loss, np.zeros(features.shape[1] + 1), jac=True, method="L-BFGS-B").x
    weight = found[:-1] / std
    return weight, float(found[-1] - weight @ mean)


def separation(scores: Vector, truth: Flags) -> float:
    """The chance that a prompt to be refused scores above a harmless one (AUC)."""
    ranks = stats.rankdata(scores)
    positive = int(truth.sum())
    return float(
        (ranks[truth].sum() - positive * (positive + 1) / 2) / (positive * (len(truth) - positive))
    )


def _best_strength(
    features: NDArray[np.float64], refuse: Flags, groups: NDArray[np.str_]
) -> tuple[float, Vector]:
    """The strength that separates unseen prompts best, and the scores [N] that each prompt has
    while unseen.
    """
    part = np.array([_number(group) // HELD_OUT % FOLDS for group in groups])
    best: tuple[float, float, Vector] | None = None
    for strength in STRENGTHS:
        scores = np.zeros(len(features))
        for number in np.unique(part):
            seen = part != number
            if refuse[seen].all() or not refuse[seen].any():
                raise InputError("too few different prompts to train on; label more")
            weight, bias = fit(features[seen], refuse[seen], strength)
            scores[~seen] = expit(features[~seen] @ weight + bias)
        quality = separation(scores, refuse)
        if best is None or quality > best[0]:
            best = (quality, strength, scores)
    assert best is not None
    return best[1], best[2]


def _threshold(harmless: Vector, most_blocked: float) -> float:
    """The lowest score that at most this share of the harmless scores reach."""
    allowed = int(most_blocked * len(harmless))
    highest = np.sort(harmless)[::-1][allowed]
    return float(np.clip(np.nextafter(highest, 1.0), 1e-6, 1.0))


def _features(
    prompts: Sequence[str], encoders: Mapping[str, ModelEncoder], names: Sequence[str]
) -> NDArray[np.float64]:
    """Pooled states [N, D]; a prompt is forgotten as soon as its states are pooled."""
    rows = []
    for start in range(0, len(prompts), BATCH):
        batch = list(prompts[start : start + BATCH])
        states = {name: encoders[name].encode(batch) for name in names}
        rows += [
            pool({name: states[name][row] for name in names}, names) for row in range(len(batch))
        ]
    return np.stack(rows)


def _held_out(groups: NDArray[np.str_], refuse: Flags) -> Flags:
    """Which prompts [N] are held out, by a hash of their words: the same in every training."""
    held_out = np.array([_number(group) % HELD_OUT == 0 for group in groups])
    for side in (held_out, ~held_out):
        if not refuse[side].any() or refuse[side].all():
            raise InputError("too few different prompts to hold some out; label more")
    return held_out


def _group(prompt: str) -> str:
    """What spellings of one prompt have in common."""
    return " ".join(words(fold(prompt)))


def _number(group: str) -> int:
    return int.from_bytes(hashlib.sha256(group.encode()).digest()[:8], "big")


def _labelled(line: str, where: str) -> Labelled:
    try:
        value = json.loads(line)
        one = Labelled(value["prompt"], value["refuse"])
    except (ValueError, LookupError, TypeError, RecursionError):
        raise InputError(
            f'{where}: a line is {{"prompt": text, "refuse": true or false}}'
        ) from None
    if not isinstance(one.prompt, str) or not isinstance(one.refuse, bool):
        raise InputError(f'{where}: a line is {{"prompt": text, "refuse": true or false}}')
    check_prompts([one.prompt], where)
    return one
