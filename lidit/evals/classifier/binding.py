"""Does the model bind attributes to the right objects? A diffusion classifier, no sampling.

The network's loss on a true image is compared under its caption and under one that is wrong in one
thing, at the same timesteps and with the same noise. The measure moves long before sampled images
follow their prompts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lidit.config.fields import LARGEST_SEED
from lidit.datasets.scenes.captions import write_caption
from lidit.datasets.scenes.generator import generate_scene
from lidit.datasets.scenes.layouts import OPPOSITE
from lidit.datasets.scenes.scene import Scene, names_colours
from lidit.datasets.scenes.shapes import vocabulary_for
from lidit.errors import InputError
from lidit.evals.statistics import Interval, bootstrap_mean
from lidit.pixels import from_bytes

Kind = Literal["binding", "attribute", "relation"]
TIMESTEPS = (0.95, 0.85, 0.7, 0.5)

# (images or latents [B, ...], captions, timesteps [B], noise like the images) -> loss per sample
# [B]
LossFunction = Callable[[Tensor, list[str], Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Measure:
    """One question: which error, in captions of which category and style, on seen or held-out
    colour-shape pairs.

    kind: "binding" swaps the colours (or sizes) of two segments, "attribute" gives one segment a
    colour that neither it nor, where there are colours enough, any other has, "relation" names the
    opposite relation.
    """

    kind: Kind
    tag: str
    style: str = "bare"
    split: Literal["train", "unseen"] = "train"

    @property
    def name(self) -> str:
        return f"{self.kind}_{self.tag}_{self.style}" + (
            "_held_out" if self.split == "unseen" else ""
        )


@dataclass(frozen=True)
class Case:
    """A scene, its caption, and a caption wrong in one thing; `positions`: the segments (from 0)
    the error is in.
    """

    scene: Scene
    caption: str
    wrong: str
    positions: tuple[int, ...]

    @property
    def image(self) -> NDArray[np.uint8]:
        return self.scene.render()


@dataclass(frozen=True)
class BindingResult:
    """Share of scenes whose loss is higher under the wrong caption (ties count half), chance 0.5.

    `gap`: mean of wrong minus true loss; `gaps` [cases, timesteps] holds every one. Exactly 0
    everywhere means that the loss does not depend on what the two captions differ in.
    `by_position`: segment -> accuracy of the cases whose error is in it. `true_loss`: timestep ->
    loss under the true captions, the same as `loss_by_timestep` of them.
    """

    accuracy: Interval
    gap: Interval
    by_position: dict[int, Interval]
    by_timestep: dict[float, float]
    gaps: NDArray[np.float64]
    true_loss: dict[float, Interval]

    def metrics(self) -> dict[str, float]:
        flat = {"accuracy": self.accuracy.value, "gap": self.gap.value}
        flat |= {
            f"accuracy_position_{position + 1}": v.value for position, v in self.by_position.items()
        }
        return flat | {f"accuracy_t_{t:g}": value for t, value in self.by_timestep.items()}


def generate_cases(
    measure: Measure, count: int, size: int, layout: str, seed: int = 0
) -> list[Case]:
    """`count` scenes of the measure's category with a true and a wrong caption, the same words but
    for the error.

    With split="train" neither caption names a held-out pair, so novelty cannot give the wrong
    caption away. Scenes are generated with seeds no training set uses, and the segment in question
    goes round, so every position is met equally often. Raises InputError where kind, category or
    style do not go together.
    """
    kind, tag, style, split = measure.kind, measure.tag, measure.style, measure.split
    _check(kind, tag, count)
    vocabulary = vocabulary_for(size, layout)
    held_out = vocabulary.held_out_pairs()
    cases: list[Case] = []
    for number in range(count):
        rng = Random(f"binding/{seed}/{layout}/{size}/{tag}/{kind}/{number}")
        for _ in range(1000):
            scene = generate_scene(rng, tag, size, layout, vocabulary, split)
            altered = _alter(kind, scene, number % len(scene.objects), rng, vocabulary.colours)
            if altered is not None and (split == "unseen" or not altered[0].shows(held_out)):
                break
        else:
            raise InputError(
                f"no {tag} scene at {size} pixels allows a wrong caption of kind {kind!r}"
            )
        other, positions = altered
        words = rng.getrandbits(64)
        caption = write_caption(scene, style, Random(words))
        cases.append(Case(scene, caption, write_caption(other, style, Random(words)), positions))
        if cases[-1].caption == cases[-1].wrong:
            raise InputError(
                f"caption style {style!r} does not say what a {kind} error changes in a {tag} scene"
            )
    return cases


def _check(kind: Kind, tag: str, count: int) -> None:
    if count < 1:
        raise InputError(f"count={count}: must be at least 1")
    fits = {
        "binding": tag == "size_attr" or (names_colours(tag) and tag != "colors"),
        "attribute": names_colours(tag),
        "relation": tag in ("position", "color_attr_position"),
    }
    if kind not in fits:
        raise InputError(f"kind {kind!r}: choose from {', '.join(fits)}")
    if not fits[kind]:
        raise InputError(
            f"a {kind} error cannot be made in {tag} captions: choose another category"
        )


def _alter(
    kind: Kind, scene: Scene, index: int, rng: Random, colours: Sequence[str]
) -> tuple[Scene, tuple[int, ...]] | None:
    """The scene a wrong caption would describe, and the segments it differs in; None where no error
    is possible.
    """
    objects = list(scene.objects)
    if kind == "relation":
        assert scene.relation is not None
        return dataclasses.replace(scene, relation=OPPOSITE[scene.relation]), (0, 1)
    if kind == "attribute":
        absent = [colour for colour in colours if all(colour != item.colour for item in objects)]
        # long lists use every colour: then one that no object of this shape has
        same = [item.colour for item in objects if item.shape == objects[index].shape]
        free = absent or [colour for colour in colours if colour not in same]
        if not free:
            return None
        objects[index] = dataclasses.replace(objects[index], colour=rng.choice(free))
        return dataclasses.replace(scene, objects=tuple(objects)), (index,)
    key = "size" if scene.tag == "size_attr" else "colour"
    mine = getattr(objects[index], key)
    # swapping two objects of one shape changes nothing but their order
    partners = [
        other
        for other, item in enumerate(objects)
        if getattr(item, key) != mine and item.shape != objects[index].shape
    ]
    if not partners:
        return None
    partner = rng.choice(partners)
    theirs = getattr(objects[partner], key)
    objects[index] = dataclasses.replace(objects[index], **{key: theirs})
    objects[partner] = dataclasses.replace(objects[partner], **{key: mine})
    return dataclasses.replace(scene, objects=tuple(objects)), (index, partner)


def pixels(cases: Sequence[Case]) -> Tensor:
    """The cases' images as float32 [N, 3, S, S] in [-1, 1]."""
    images = np.stack([case.image for case in cases])  # [N, S, S, 3]
    return from_bytes(torch.from_numpy(images).permute(0, 3, 1, 2))


@torch.no_grad()
def measure_binding(
    loss: LossFunction,
    cases: Sequence[Case],
    images: Tensor | None = None,
    timesteps: Sequence[float] = TIMESTEPS,
    batch_size: int = 64,
    seed: int = 0,
) -> BindingResult:
    """Runs the classifier on `cases`; `images` [N, ...] are their latents where the model is not on
    pixels.

    `loss` gets both captions of a case at the same timesteps and with the same noise, which depends
    on the case's place and the timestep only, so arms and steps can be compared pairwise. Raises
    InputError where it does not give one finite value per sample.
    """
    images = pixels(cases) if images is None else images
    if len(images) != len(cases) or not cases:
        raise InputError(
            f"{len(cases)} cases and {len(images)} images: one image is needed per case"
        )
    # cases of one caption are a cluster: they are not independent
    captions = [case.caption for case in cases]
    true = loss_table(loss, images, captions, timesteps, batch_size, seed)
    wrong = loss_table(loss, images, [case.wrong for case in cases], timesteps, batch_size, seed)
    gaps = wrong - true
    decided = wins(gaps.mean(axis=1))
    positions = sorted({position for case in cases for position in case.positions})
    at = {p: [index for index, case in enumerate(cases) if p in case.positions] for p in positions}
    return BindingResult(
        accuracy=bootstrap_mean(decided, captions),
        gap=bootstrap_mean(gaps.mean(axis=1), captions),
        by_position={
            p: bootstrap_mean(decided[chosen], [captions[i] for i in chosen])
            for p, chosen in at.items()
        },
        by_timestep={t: float(wins(gaps[:, index]).mean()) for index, t in enumerate(timesteps)},
        gaps=gaps,
        true_loss=_by_timestep(true, captions, timesteps),
    )


@torch.no_grad()
def loss_by_timestep(
    loss: LossFunction,
    images: Tensor,
    captions: Sequence[str],
    timesteps: Sequence[float] = TIMESTEPS,
    batch_size: int = 64,
    seed: int = 0,
) -> dict[float, Interval]:
    """Validation loss at each timestep with fixed noise: `images` [N, ...] and one caption each.
    Errors as above.
    """
    table = loss_table(loss, images, list(captions), timesteps, batch_size, seed)
    return _by_timestep(table, captions, timesteps)


def _by_timestep(
    table: NDArray[np.float64], captions: Sequence[str], timesteps: Sequence[float]
) -> dict[float, Interval]:
    return {t: bootstrap_mean(table[:, index], captions) for index, t in enumerate(timesteps)}


def loss_table(
    loss: LossFunction,
    images: Tensor,
    captions: list[str],
    timesteps: Sequence[float],
    batch_size: int,
    seed: int,
) -> NDArray[np.float64]:
    """Loss [N, timesteps] with noise seeded by (seed, timestep's place), the same whatever the
    batch size.
    """
    if len(captions) != len(images) or not captions:
        raise InputError(
            f"{len(images)} images and {len(captions)} captions: one caption is needed per image"
        )
    table = np.empty((len(images), len(timesteps)))
    for column, t in enumerate(timesteps):
        generator = torch.Generator().manual_seed((seed * 1_000_003 + column) & LARGEST_SEED)
        noise = torch.randn(images.shape, generator=generator).to(images.device)
        for start in range(0, len(images), batch_size):
            part = slice(start, start + batch_size)
            batch = images[part]
            times = torch.full((len(batch),), t, device=images.device)
            values = loss(batch, captions[part], times, noise[part])
            if values.shape != (len(batch),) or not torch.isfinite(values).all():
                raise InputError(
                    f"loss at t={t}: expected {len(batch)} finite values, got {list(values.shape)}"
                )
            table[part, column] = values.double().cpu().numpy()
    return table


def wins(gaps: NDArray[np.float64]) -> NDArray[np.float64]:
    """1 where the wrong caption costs more, 0.5 where it costs the same."""
    return (gaps > 0) + 0.5 * (gaps == 0)
