"""A small corpus that lies on the GPU whole: batches of a training are gathered there, no step
reads anything.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from lidit.config import Recipe
from lidit.data.assembler import TrainingBatch
from lidit.data.order import Order
from lidit.data.rng import Purpose, uniform
from lidit.data.rows import Rows
from lidit.models import TextStates
from lidit.store import Corpus

LENGTHS = 32  # batches have multiples of so many tokens


class ResidentText:
    """One family's captions: all tokens one after the other, the empty caption last."""

    def __init__(self, corpus: Corpus, fingerprint: str, device: torch.device) -> None:
        family = corpus.text_family(fingerprint)
        shared, rows, self.first = family.shared(), [], [0]
        for unit in range(corpus.num_units):
            found = family.read(unit)
            rows += [row.float() for row in found]
            self.first.append(self.first[-1] + len(found))
        rows.append(shared.empty.float())
        self.lengths = np.array([len(row) for row in rows])
        self.starts = np.concatenate([[0], np.cumsum(self.lengths)[:-1]])
        self.tokens, self.prefix = torch.cat(rows).to(device), shared.prefix.float().to(device)
        self.mean, self.deviation = shared.mean, shared.deviation

    def batch(self, captions: np.ndarray) -> TextStates:
        """The states of these captions, -1 for the empty one."""
        lengths = self.lengths[captions]
        longest = -(-max(1, int(lengths.max())) // LENGTHS) * LENGTHS
        mask = np.arange(longest)[None] < lengths[:, None]
        places = np.where(mask, self.starts[captions][:, None] + np.arange(longest)[None], 0)
        device = self.tokens.device
        where = torch.from_numpy(places).to(device, non_blocking=True)
        valid = torch.from_numpy(mask).to(device, non_blocking=True)
        return TextStates(self.tokens[where] * valid[..., None], valid, self.prefix)


class ResidentCorpus:
    """Latents and the captions of any of its text families."""

    def __init__(self, folder: str, latents: str, device: torch.device) -> None:
        self.corpus, self.device = Corpus.open(folder), device
        family, found, self.first = self.corpus.latent_family(latents), [], [0]
        for unit in range(self.corpus.num_units):
            found.append(torch.stack(family.read(unit)))
            self.first.append(self.first[-1] + len(found[-1]))
        self.latents = torch.cat(found).to(device)
        self._texts: dict[str, ResidentText] = {}

    def text(self, fingerprint: str) -> ResidentText:
        if fingerprint not in self._texts:
            self._texts[fingerprint] = ResidentText(self.corpus, fingerprint, self.device)
        return self._texts[fingerprint]

    def feed(self, recipe: Recipe, texts: Mapping[str, str]) -> ResidentFeed:
        """The batches of a training. texts: encoder -> fingerprint."""
        return ResidentFeed(self, recipe, {name: self.text(found) for name, found in texts.items()})


class ResidentFeed:
    """The samples, captions and noise levels that `open_feed` gives; the noise is the GPU's, by
    seed and step.
    """

    def __init__(
        self, data: ResidentCorpus, recipe: Recipe, texts: Mapping[str, ResidentText]
    ) -> None:
        self.data, self.settings, self.texts = data, recipe.data, texts
        self.rows = Rows(data.corpus, recipe.data)
        self.order: Order = self.rows.order(recipe.train.batch_size)
        self.noise = torch.Generator(data.device)

    def batch(self, step: int) -> TrainingBatch:
        """Global batch number `step`."""
        drawn, settings = self.order.batch(step), self.settings
        pick, dropped, u = (
            uniform(settings.seed, purpose, drawn.epoch, drawn.unit, drawn.row)
            for purpose in (Purpose.CAPTION, Purpose.DROPOUT, Purpose.TIMESTEP)
        )
        places, captions, keys = [], [], []
        for unit, row, chance, drop in zip(drawn.unit, drawn.row, pick, dropped, strict=True):
            info = self.rows.unit(int(unit))
            chosen = int(info.choose(np.array([row]), np.array([chance]))[0])
            places.append(self.data.first[int(unit)] + int(row))
            captions.append(-1 if drop < settings.caption_dropout else chosen)
            keys.append(info.keys[int(row)])
        of_unit = {
            name: np.array([text.first[int(unit)] for unit in drawn.unit])
            for name, text in self.texts.items()
        }
        empty, wanted = np.array(captions) < 0, np.array(captions)
        text = {
            name: found.batch(np.where(empty, len(found.lengths) - 1, of_unit[name] + wanted))
            for name, found in self.texts.items()
        }
        latents = self.data.latents[torch.tensor(places, device=self.data.device)]
        self.noise.manual_seed((settings.seed << 32) + step)
        noise = torch.randn(latents.shape, generator=self.noise, device=self.data.device)
        levels = torch.from_numpy(u).float().to(self.data.device)
        return TrainingBatch(step, tuple(keys), latents, noise, levels, text, 0)
