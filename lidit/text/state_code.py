"""An encoder's code for `storage: coded`: made from the calibration captions' states, and what it
costs, in words.

Legend: T tokens of a caption, W width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from lidit.errors import InputError
from lidit.store.coding.fit import fit_code
from lidit.store.coding.transform import StateCode, quantise, restore, standardise
from lidit.text.encoder import PromptEncoder

SWAPS = 64  # captions in which two words are exchanged
# rms in deviations: a token that exchanging two words moves by less is not concerned
CONCERNED = 0.1
WORTHWHILE = 1.25  # times smaller than int8: below that a code is not worth its basis
# What captions say of objects in one word.
COLOURS = (
    "red",
    "orange",
    "yellow",
    "green",
    "blue",
    "purple",
    "pink",
    "brown",
    "black",
    "white",
    "grey",
    "golden",
)
KINDS = (
    "large",
    "small",
    "tall",
    "round",
    "square",
    "wooden",
    "metallic",
    "glass",
    "leather",
    "fluffy",
    "left",
    "right",
)
ATTRIBUTES = {*COLOURS, *KINDS}


def family_code(
    encoder: PromptEncoder,
    captions: Sequence[str],
    sample: Sequence[torch.Tensor],
    statistics: tuple[torch.Tensor, torch.Tensor],
) -> StateCode:
    """The code of an encoder's family, on the CPU, from the states [T, W] of its calibration
    captions.

    statistics: mean and deviation [W] of each channel. Raises InputError for fewer than two
    captions with a token.
    """
    if sum(len(states) > 0 for states in sample) < 2:
        raise InputError(
            f"encoder {encoder.spec.name}: storage coded measures its error on captions it was "
            "not made from, and the "
            "corpus has fewer than two; set storage: int8"
        )
    device, error = encoder.trunk.device, encoder.spec.storage_error
    assert error is not None
    mean, deviation = (values.to(device) for values in statistics)
    code = fit_code([standardise(states.to(device), mean, deviation) for states in sample], error)
    assert code.quality is not None
    swap = _swap_error(encoder, captions, (mean, deviation), code)
    return replace(code, quality=replace(code.quality, swap=swap)).to("cpu")


def in_words(code: StateCode) -> Iterator[str]:
    """What a family's states will take and lose, before any is computed."""
    quality = code.quality
    if quality is None:
        return
    int8 = 8 + 32 / len(code.basis)  # a scale per token
    swap = (
        ""
        if quality.swap is None
        else f"; of two exchanged words' difference {quality.swap:.2f} is lost"
    )
    yield (
        f"coded: {quality.bits:.2f} bits per dimension at an error of {quality.rms:.3f} "
        "deviations on held-out "
        f"captions, {int8 / quality.bits:.1f} times smaller than int8; worst token "
        f"{quality.worst_token:.2f} of its "
        f"size{swap}"
    )
    if int8 / quality.bits < WORTHWHILE:
        yield (
            f"coded gains less than a quarter over int8 ({int8:.2f} bits): storage: int8 is "
            "simpler, and more exact"
        )


def exchanged(caption: str) -> str | None:
    """The caption with two words exchanged: attributes where it has two, else the first and the
    last long word.
    """
    words = caption.split()
    for wanted in (lambda word: word.lower().strip(",.") in ATTRIBUTES, lambda word: len(word) > 3):
        places = [place for place, word in enumerate(words) if wanted(word)]
        if places and words[places[0]] != words[places[-1]]:
            first, last = places[0], places[-1]
            words[first], words[last] = words[last], words[first]
            return " ".join(words)
    return None


def _swap_error(
    encoder: PromptEncoder,
    captions: Sequence[str],
    statistics: tuple[torch.Tensor, torch.Tensor],
    code: StateCode,
) -> float | None:
    """Error of the differences that exchanging two words makes, as a share of them; None without
    such captions.
    """
    pairs = [(text, other) for text in captions if (other := exchanged(text)) is not None]
    pairs = pairs[:: max(1, len(pairs) // SWAPS)][:SWAPS]
    encoded = encoder.encode([text for pair in pairs for text in pair])
    lost, moved = 0.0, 0.0
    for one, changed in zip(encoded[0::2], encoded[1::2], strict=True):
        if len(one.states) != len(changed.states):  # tokens no longer correspond
            continue
        # [T, W] each
        z = [
            standardise(found.states.to(code.basis.device), *statistics) for found in (one, changed)
        ]
        back = [restore(*quantise(states, code), code) for states in z]
        difference = z[1] - z[0]
        concerned = difference.square().mean(-1) > CONCERNED**2
        lost += float((back[1] - back[0] - difference)[concerned].square().sum())
        moved += float(difference[concerned].square().sum())
    return math.sqrt(lost / moved) if moved else None
