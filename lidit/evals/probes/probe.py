"""What the states of a prompt hold, and where: linear probes, norms and outlier channels of every
block of an LLM.

Training is not involved. Captions are of scenes with four objects, so every word's place and
meaning is known. A
probe is linear: ridge regression of standardised states on one-hot labels, judged on captions it
has not seen.

Legend: N captions, K segments, S places, L blocks, T tokens, W width, C classes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lidit.datasets.scenes.captions import write_caption
from lidit.datasets.scenes.generator import generate_scene
from lidit.datasets.scenes.shapes import vocabulary_for
from lidit.errors import InputError
from lidit.text import PromptEncoder
from lidit.text.every_layer import every_layer, prefix_layers

SEGMENTS, SIDE = 4, 32
TRAIN_SHARE = 0.75
# of the number of training captions: the states are standardised, so their covariance has trace W
RIDGE = 0.1
CLAMP = 10.0  # as the model's conditioner clamps
OUTLIER = 10.0  # a channel whose root mean square is this many times the median channel's

# Each question: which state is read -> what is asked of it. Segment by segment, then averaged.
QUESTIONS = {
    "colour at its noun": ("noun", "colour"),
    "colour at the next noun": ("next noun", "colour"),
    "colour at the last token": ("last", "colour"),
    "colour in the mean state": ("mean", "colour"),
    "shape at its colour word": ("colour word", "shape"),
}


@dataclass(frozen=True)
class ProbeCaption:
    """A caption of four segments: their labels, and where in the text each noun and each colour
    word ends.
    """

    text: str
    colours: tuple[int, ...]
    shapes: tuple[int, ...]
    noun_ends: tuple[int, ...]
    colour_ends: tuple[int, ...]


@dataclass(frozen=True)
class LayerFacts:
    """One block's caption states: mean norm, share of the squared norm in the strongest channel,
    number of outlier channels (root mean square over 10 times the median's), and the norm of the
    sequence's first token, the sink.
    """

    norm: float
    strongest_share: float
    outliers: int
    sink_norm: float | None


@dataclass(frozen=True)
class ProbeResult:
    """One LLM in one setting on one caption style. `accuracy`: question -> [L, K], block by segment
    position.
    """

    encoder: str
    style: str
    accuracy: dict[str, NDArray[np.float64]]
    layers: tuple[LayerFacts, ...]
    captions: int
    tokens: float  # mean per caption


def chance(question: str) -> float:
    """What guessing gives: colours and shapes of a segment are uniform."""
    vocabulary = vocabulary_for(SIDE)
    return 1 / len(vocabulary.colours if QUESTIONS[question][1] == "colour" else vocabulary.shapes)


def probe_captions(style: str, count: int, seed: int = 0) -> list[ProbeCaption]:
    """`count` captions of scenes with four objects of different shapes and colours,
    in one style.
    """
    vocabulary = vocabulary_for(SIDE)
    captions = []
    for number in range(count):
        rng = Random(f"probe/{seed}/{style}/{number}")
        scene = generate_scene(rng, f"list{SEGMENTS}", SIDE, "free", vocabulary, "any")
        text = write_caption(scene, style, rng)
        captions.append(
            ProbeCaption(
                text,
                tuple(vocabulary.colours.index(item.colour) for item in scene.objects),
                tuple(vocabulary.shapes.index(item.shape) for item in scene.objects),
                tuple(_end_of(item.shape, text) for item in scene.objects),
                tuple(_end_of(item.colour, text) for item in scene.objects),
            )
        )
    return captions


def _end_of(word: str, text: str) -> int:
    """Index of the last character of the word's first mention."""
    match = re.search(rf"\b{word}\b", text)
    if match is None:
        raise InputError(f"probe captions must name {word!r}, found {text!r}")
    return match.end() - 1


def probe_encoder(
    encoder: PromptEncoder, name: str, style: str, captions: Sequence[ProbeCaption]
) -> ProbeResult:
    """Answers every question at every block of a loaded LLM (all blocks, see `every_layer`).

    Raises InputError for fewer than 8 captions or a tokenizer that does not tell where its tokens
    lie in the text.
    """
    if len(captions) < 8:
        raise InputError(f"{len(captions)} captions: a probe needs at least 8")
    ids, places = _token_places(encoder, captions)
    states, layers = _collect(encoder, ids, places)
    accuracy = {
        question: np.stack(
            [
                _answers(states[place], [getattr(c, f"{label}s")[k] for c in captions], k)
                for k in range(SEGMENTS)
            ],
            axis=1,
        )
        for question, (place, label) in QUESTIONS.items()
    }
    return ProbeResult(
        name, style, accuracy, layers, len(captions), float(np.mean([len(row) for row in ids]))
    )


def _token_places(
    encoder: PromptEncoder, captions: Sequence[ProbeCaption]
) -> tuple[list[list[int]], dict[str, NDArray[np.int64]]]:
    """Token ids per caption, and per kind of place the token of every segment [N, K]."""
    tokenizer = encoder.tokenizer.tokenizer
    if not getattr(tokenizer, "is_fast", False):
        raise InputError(
            f"{encoder.spec.folder}: the tokenizer does not say where its tokens lie; it "
            "needs a fast one"
        )
    special = encoder.spec.kind == "encoder"
    found = tokenizer(
        [caption.text for caption in captions],
        add_special_tokens=special,
        split_special_tokens=True,
        return_offsets_mapping=True,
    )
    nouns = _tokens_at(found["offset_mapping"], [caption.noun_ends for caption in captions])
    last = np.array([[len(row) - 1] * SEGMENTS for row in found["input_ids"]])
    places = {
        "noun": nouns,
        # behind the last noun: the caption's end
        "next noun": np.concatenate([nouns[:, 1:], last[:, :1]], axis=1),
        "colour word": _tokens_at(
            found["offset_mapping"], [caption.colour_ends for caption in captions]
        ),
        "last": last,
    }
    return found["input_ids"], places


def _tokens_at(
    offsets: Sequence[Sequence[tuple[int, int]]], ends: Sequence[Sequence[int]]
) -> NDArray[np.int64]:
    """The token that holds each character [N, K]."""
    return np.array(
        [
            [
                next(i for i, (start, stop) in enumerate(spans) if start <= end < stop)
                for end in wanted
            ]
            for spans, wanted in zip(offsets, ends, strict=True)
        ]
    )


def _collect(
    encoder: PromptEncoder, ids: list[list[int]], places: dict[str, NDArray[np.int64]]
) -> tuple[dict[str, torch.Tensor], tuple[LayerFacts, ...]]:
    """The states at the places, [L, N, K, W] each, and every block's facts. Only what is asked for
    is kept.
    """
    blocks, width = encoder.spec.blocks, encoder.spec.width
    kept = {place: torch.empty(blocks, len(ids), SEGMENTS, width) for place in (*places, "mean")}
    squares, norms = (
        torch.zeros(blocks, width, dtype=torch.float64),
        torch.zeros(blocks, dtype=torch.float64),
    )
    for rows, states in every_layer(encoder, ids):  # [L, B, T, W]
        for place, tokens in places.items():
            # [L, B, K, W]
            chosen = torch.from_numpy(tokens[rows])[None, :, :, None].expand(blocks, -1, -1, width)
            kept[place][:, rows] = states.gather(2, chosen)
        kept["mean"][:, rows] = states.mean(2, keepdim=True).expand(-1, -1, SEGMENTS, -1)
        squares += states.double().square().sum((1, 2))
        norms += states.double().norm(dim=-1).sum((1, 2))
    count = sum(len(row) for row in ids)
    before = prefix_layers(encoder)
    sink = [None] * blocks if before is None else before[:, 0].norm(dim=-1).tolist()
    return kept, tuple(
        _facts(squares[b] / count, float(norms[b]) / count, sink[b]) for b in range(blocks)
    )


def _facts(square: torch.Tensor, norm: float, sink: float | None) -> LayerFacts:
    root = square.sqrt()
    outliers = int((root > OUTLIER * root.median()).sum())
    return LayerFacts(norm, float(square.max() / square.sum()), outliers, sink)


def _answers(states: torch.Tensor, labels: Sequence[int], segment: int) -> NDArray[np.float64]:
    """Accuracy [L] of one probe per block on states [L, N, K, W] of one segment."""
    wanted = torch.tensor(labels)
    train = int(TRAIN_SHARE * len(labels))
    return np.array([linear_probe(block[:, segment], wanted, train) for block in states])


def linear_probe(features: torch.Tensor, labels: torch.Tensor, train: int) -> float:
    """Accuracy on the rows from `train` on of a ridge probe fitted to the rows before: [N, W]
    float, [N] int.
    """
    known = features[:train].double()
    mean, deviation = known.mean(0), known.std(0)
    deviation = torch.where(
        deviation > 1e-6 * mean.abs() + 1e-12, deviation, torch.ones_like(deviation)
    )
    scaled = ((features.double() - mean) / deviation).clamp(-CLAMP, CLAMP)
    targets = torch.nn.functional.one_hot(labels).double()  # [N, C]
    centre = targets[:train].mean(0)
    x = scaled[:train]
    # in the smaller of the two dimensions: a caption has fewer rows than an LLM has channels
    gram = x @ x.T + RIDGE * train * torch.eye(train, dtype=x.dtype)
    weights = x.T @ torch.linalg.solve(gram, targets[:train] - centre)  # [W, C]
    guesses = (scaled[train:] @ weights + centre).argmax(1)
    return float((guesses == labels[train:]).double().mean())


def settings_grid(
    settings: Any, instructions: Sequence[bool] = (False, True)
) -> list[tuple[str, Any]]:
    """(name, settings) of one LLM with and without instruction, causal and with the mask removed,
    all blocks kept.

    Settings without an instruction of their own are given the paper's where one is wanted.
    An encoder of kind "encoder" has one setting only: it reads the bare caption in both directions.
    """
    whole = settings.model_copy(update={"layer": -1, "instruction": settings.instruction or None})
    if settings.kind == "encoder":
        return [(f"{settings.name}, encoder", whole)]
    grid = []
    for kind, label in (("causal", "causal"), ("unmasked", "mask removed")):
        for instructed in instructions:
            changes = {"kind": kind} if instructed else {"kind": kind, "instruction": "",
                                                         "system_prompt": "",
                                                         "chat_template": False}  # fmt: skip
            name = f"{settings.name}, {label}, {'instruction' if instructed else 'bare'}"
            grid.append((name, whole.model_copy(update=changes)))
    return grid
