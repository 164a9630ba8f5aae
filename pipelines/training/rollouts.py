"""Rounds of an alignment: every worker draws pictures of its captions, they are rewarded, and pairs
are learnt from.

The batches of a round, with the predictions of the model that drew it, are made when the round
begins and kept in the run's folder: a run that goes on in the middle of a round learns from the
same pictures.

Shapes: P captions of a round, G pictures of each, M pairs, S steps, B pairs of a step, C, H, W of a
latent.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from safetensors.torch import load_file, save

from lidit.codecs import load_codec
from lidit.config.align import AlignRecipe
from lidit.data.assembler import TrainingBatch
from lidit.data.captions import Caption, CaptionDraws
from lidit.data.order import shares
from lidit.data.rng import Purpose, draw, fill_gaussian, permutation, uniform
from lidit.diffusion import GuidedPredictor, initial_noise, sample, seeded_generators
from lidit.evals.rewards.base import rewards_of
from lidit.evals.rewards.opening import open_reward
from lidit.models import LIDiT, TextStates
from lidit.pixels import unit_to_bytes
from lidit.store.files.atomic import publish_bytes
from lidit.store.files.folder import Folder
from pipelines.training import checkpoints
from pipelines.training.engine import Engine

FOLDER = "rounds"  # of a run
Rewards = NDArray[np.float64]  # [P, G]


@dataclass(frozen=True)
class PairBatch(TrainingBatch):
    """B pairs: `latents` are the better pictures. What the drawing model and the start predict
    there is [B, 2, ...].
    """

    worse: torch.Tensor
    gap: torch.Tensor
    drawn: torch.Tensor
    start: torch.Tensor

    def to(self, device: torch.device) -> PairBatch:
        moved = {
            name: getattr(self, name).to(device) for name in ("worse", "gap", "drawn", "start")
        }
        return replace(super().to(device), **moved)  # type: ignore[return-value]

    def split(self, parts: int) -> list[PairBatch]:  # type: ignore[override]
        own = ("latents", "noise", "u", "worse", "gap", "drawn", "start")
        return [
            replace(
                self,
                keys=self.keys[cut],
                text={
                    n: replace(s, states=s.states[cut], mask=s.mask[cut])
                    for n, s in self.text.items()
                },
                tokens=self.tokens // parts,
                **{name: getattr(self, name)[cut] for name in own},
            )
            for cut in shares(len(self.keys), parts)
        ]

    @property
    def rows(self) -> torch.Tensor:
        """Caption of each of the 2 B latents, the better ones first."""
        return torch.arange(len(self.keys), device=self.latents.device).repeat(2)

    @property
    def both(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Latents, noise and u of 2 B rows: the two of a pair share the last two."""
        return (
            torch.cat([self.latents, self.worse]),
            self.noise.repeat(2, 1, 1, 1),
            self.u.repeat(2),
        )


@dataclass(frozen=True)
class Round:
    """`tensors`: pictures [M, 2, C, H, W], caption [M], gap [M]; drawn and start [S B, 2, C, H, W]
    of all workers.
    """

    number: int
    captions: list[Caption]
    tensors: Mapping[str, torch.Tensor]


def pair_up(rewards: Rewards) -> list[tuple[int, int, int, float]]:
    """(caption, better, worse, gap) of rewards [P, G]: best with worst, second with second worst,
    while they differ.
    """
    pairs = []
    for caption, given in enumerate(rewards):
        ranked = np.argsort(-given, kind="stable")
        for better, worse in zip(ranked, ranked[::-1]):
            if given[better] <= given[worse]:
                break
            pairs.append((caption, int(better), int(worse), float(given[better] - given[worse])))
    return pairs


class Asked:
    """The engine's network, sharded or not, as sampling asks it: in its own precision. One that
    takes a guidance scale is not aligned.
    """

    takes_guidance = False

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def __call__(
        self, x_t: torch.Tensor, t: torch.Tensor, text: Any, rows: torch.Tensor | None
    ) -> torch.Tensor:
        predicted: torch.Tensor = self.engine.deepspeed(
            x_t.to(self.engine.compute_dtype), t, text, rows
        )
        return predicted


class Rollouts:
    """One worker's part of every batch, drawn as the training goes; collective, so all workers ask
    for the same steps.

    waited: seconds spent on rounds. fresh: metrics of a round drawn since the job last took them.
    """

    def __init__(
        self,
        recipe: AlignRecipe,
        engine: Engine,
        captions: CaptionDraws,
        shape: tuple[int, int, int],
        first: LIDiT | None,
    ) -> None:
        self.recipe, self.engine, self.captions, self.shape = recipe, engine, captions, shape
        self.first = first  # the network before the first step, for the distance to it
        self.reward = open_reward(recipe.reward)
        self.codec = load_codec(recipe.codec, str(engine.device))
        self.folder = recipe.run_folder / FOLDER
        share = shares(recipe.train.batch_size, engine.world_size)[engine.rank]
        self.start, self.stop = share.start, share.stop
        self.waited = 0.0
        self.round: Round | None = None
        self.fresh: dict[str, float] = {}

    @property
    def steps_per_epoch(self) -> int:
        """Steps until as many captions have been drawn as there are samples."""
        rollout = self.recipe.rollout
        return -(-int(self.captions.before[-1]) // rollout.prompts) * rollout.steps

    def batches(
        self, start: int, stop: int, device: torch.device | None = None
    ) -> Iterator[TrainingBatch]:
        for step in range(start, stop):
            began = time.perf_counter()
            number, place = divmod(step, self.recipe.rollout.steps)
            if self.round is None or self.round.number != number:
                self.round = (self._kept(number) if place else None) or self._collect(number)
            batch = self._batch(self.round, step)
            self.waited += time.perf_counter() - began
            yield batch if device is None else batch.to(device)

    # -- a round -----------------------------------------------------------------------------------

    @torch.no_grad()
    def _collect(self, number: int) -> Round:
        """Draw, reward and pair; then what the drawing weights predict for every batch of the
        round.
        """
        captions = self.captions.drawn(number, self.recipe.rollout.prompts)
        self.engine.deepspeed.eval()
        pictures, rewards = self._pictures(number, captions)

        # Without any difference nothing can be learnt: pairs of equal worth move nothing.
        pairs = pair_up(rewards)
        used = pairs or [(caption, 0, 1, 0.0) for caption in range(len(captions))]
        caption, better, worse = (torch.tensor([pair[i] for pair in used]) for i in range(3))
        tensors = {
            "pictures": torch.stack([pictures[caption, better], pictures[caption, worse]], dim=1),
            "caption": caption,
            "gap": torch.tensor([pair[3] for pair in used], dtype=torch.float32),
        }
        # At the noisy latents that the steps will look at, before the weights move.
        tensors |= self._predictions(Round(number, captions, tensors))
        self.engine.deepspeed.train()

        self.fresh = {
            "rollout/reward": float(rewards.mean()),
            "rollout/best_reward": float(rewards.max(1).mean()),
            "rollout/pairs": float(len(pairs)),
        }
        if self.first is not None:
            away = (tensors["drawn"] - tensors["start"]).square().mean()
            self.fresh["rollout/distance_to_start"] = float(away)
        if self.engine.rank == 0:
            self._keep(number, tensors)
        return Round(number, captions, tensors)

    def _pictures(self, number: int, captions: list[Caption]) -> tuple[torch.Tensor, Rewards]:
        """Latents [P, G, C, H, W] and rewards [P, G] of all workers, on the CPU."""
        rollout, device = self.recipe.rollout, self.engine.device
        # Each worker's share, and zeros elsewhere: their sum puts all together exactly.
        latents = torch.zeros(rollout.prompts, rollout.pictures, *self.shape, device=device)
        rewards = torch.zeros(rollout.prompts, rollout.pictures, dtype=torch.float64, device=device)
        share = shares(rollout.prompts, self.engine.world_size)[self.engine.rank]
        each = max(1, rollout.batch_size // rollout.pictures)
        for place in range(share.start, share.stop, each):
            cut = slice(place, min(place + each, share.stop))
            latents[cut], rewards[cut] = self._draw(number, captions, range(cut.start, cut.stop))
        dist.all_reduce(latents)
        dist.all_reduce(rewards)
        return latents.cpu(), rewards.cpu().numpy()

    def _predictions(self, made: Round) -> dict[str, torch.Tensor]:
        """`drawn` and `start` [S B, 2, C, H, W] of all workers, on the CPU; `start` without rows
        where it is unused.
        """
        size, device = self.recipe.train.batch_size, self.engine.device
        rows = self.recipe.rollout.steps * size
        networks = {"drawn": self.engine.deepspeed, "start": self.first}
        found = {
            name: torch.zeros(0 if network is None else rows, 2, *self.shape, device=device)
            for name, network in networks.items()
        }
        for place in range(self.recipe.rollout.steps):
            batch = self._batch(made, made.number * self.recipe.rollout.steps + place).to(device)
            at = place * size + self.start
            for part in batch.split(self.engine.micro_steps):
                for name, network in networks.items():
                    if network is not None:
                        found[name][at : at + len(part.keys)] = self._predicted(network, part)
                at += len(part.keys)
        for values in found.values():
            dist.all_reduce(values)
        return {name: values.cpu() for name, values in found.items()}

    def _draw(
        self, number: int, captions: list[Caption], places: range
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Pictures of the captions at these places of the round: latents [p, G, C, H, W] and
        rewards [p, G].
        """
        count, device = self.recipe.rollout.pictures, self.engine.device
        sampler = self.recipe.rollout.sampler.applied(self.recipe.sampler)
        own = [captions[place] for place in places]
        keys = np.repeat(np.array(places), count), np.tile(np.arange(count), len(own))
        seeds = (
            draw(self.recipe.data.seed, Purpose.PICTURE, number, *keys) >> np.uint64(1)
        ).tolist()
        generators = seeded_generators(seeds)
        noise = initial_noise(generators, self.shape, device)
        rows = [row for row in range(len(own)) for _ in range(count)]
        network: Any = Asked(self.engine)
        predict = GuidedPredictor(network, self._text(own), self._empty, sampler, rows=rows)
        latents = sample(predict, self.engine.objective, noise, sampler, generators)
        shown = unit_to_bytes(self.codec.decode(latents)).permute(0, 2, 3, 1).cpu().numpy()
        records = [own[row].record for row in rows]
        given = rewards_of(self.reward, f"reward.kind: {self.recipe.reward.kind!r}", shown, records)
        shape = (len(own), count)
        return latents.view(*shape, *self.shape), torch.tensor(given, dtype=torch.float64).view(
            shape
        )

    def _predicted(self, network: Any, part: PairBatch) -> torch.Tensor:
        """What a network predicts for the pairs of a part of a batch, [b, 2, C, H, W]."""
        x0, noise, u = part.both
        t = self.engine.objective.timesteps(u)
        x_t = self.engine.objective.add_noise(x0, noise, t)
        predicted = network(x_t.to(self.engine.compute_dtype), t, part.text, part.rows).float()
        return torch.stack(predicted.chunk(2), dim=1)

    def _text(self, captions: list[Caption]) -> dict[str, TextStates]:
        return {
            name: states.to(self.engine.device)
            for name, states in self.captions.states(captions).items()
        }

    @property
    def _empty(self) -> dict[str, TextStates]:
        shared = {name: family.shared() for name, family in self.captions.texts.items()}
        return {
            n: TextStates.collate([s.empty], s.prefix).to(self.engine.device)
            for n, s in shared.items()
        }

    # -- its batches -------------------------------------------------------------------------------

    def _batch(self, made: Round, step: int) -> PairBatch:
        """This worker's pairs of a step: the round's in an order of its own, as often as the steps
        need them.
        """
        train, seed, tensors = self.recipe.train, self.recipe.data.seed, made.tensors
        count = len(tensors["gap"])
        within = step % self.recipe.rollout.steps * train.batch_size
        places = np.arange(within + self.start, within + self.stop)
        turns = {
            turn: permutation(count, seed, Purpose.PAIR, made.number, turn)
            for turn in set(places // count)
        }
        chosen = torch.tensor([int(turns[place // count][place % count]) for place in places])

        pictures, captions = (
            tensors["pictures"][chosen],
            [made.captions[i] for i in tensors["caption"][chosen]],
        )
        noise = torch.empty_like(pictures[:, 0])
        fill_gaussian(noise, draw(seed, Purpose.NOISE, made.number, places))
        text = self.captions.states(captions)
        none = torch.zeros(len(places), 0)
        return PairBatch(
            step=step,
            keys=tuple(caption.key for caption in captions),
            latents=pictures[:, 0],
            worse=pictures[:, 1],
            noise=noise,
            u=torch.from_numpy(uniform(seed, Purpose.TIMESTEP, made.number, places)).float(),
            text=text,
            tokens=int(sum(states.mask.sum() for states in text.values())),
            gap=tensors["gap"][chosen],
            drawn=tensors["drawn"][places] if "drawn" in tensors else none,
            start=tensors["start"][places] if len(tensors.get("start", ())) else none,
        )

    # -- its file ----------------------------------------------------------------------------------

    def _path(self, number: int) -> Path:
        return self.folder / f"round-{number:06}.safetensors"

    def _keep(self, number: int, tensors: Mapping[str, torch.Tensor]) -> None:
        """Write this round; remove those before the oldest checkpoint."""
        self.folder.mkdir(parents=True, exist_ok=True)
        content = save({name: value.contiguous() for name, value in tensors.items()})
        publish_bytes(Folder.at(self.folder), self._path(number).name, content)
        steps = [
            int(folder.name.removeprefix("step-"))
            for folder in checkpoints.candidates(self.recipe.run_folder)
        ]
        oldest = min(steps, default=0) // self.recipe.rollout.steps
        for path in self.folder.glob("round-*.safetensors"):
            if int(path.stem.removeprefix("round-")) < min(oldest, number):
                path.unlink(missing_ok=True)

    def _kept(self, number: int) -> Round | None:
        """The round that was interrupted; None where its file is gone: then it is drawn anew."""
        path = self._path(number)
        here = [path.is_file()]
        dist.broadcast_object_list(here)  # one decision for all workers
        if not here[0]:
            return None
        return Round(
            number, self.captions.drawn(number, self.recipe.rollout.prompts), load_file(path)
        )
