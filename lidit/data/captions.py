"""A corpus's captions as prompts to draw, each with what the corpus knows of its sample. Images are
not needed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lidit.data.rng import Purpose, draw
from lidit.errors import InputError
from lidit.models.states import TextStates
from lidit.store import Corpus, TextFamily


@dataclass(frozen=True)
class Caption:
    """`record`: the sample's metadata, with the caption as `prompt`."""

    unit: int
    index: int
    key: str
    record: Mapping[str, Any]


class CaptionDraws:
    """Captions of all samples, drawn with replacement: a pure function of seed and round.

    fingerprints: encoder -> text family. Raises InputError for a family that is missing, or a
    corpus without samples.
    """

    def __init__(self, corpus: Corpus, fingerprints: Mapping[str, str], seed: int) -> None:
        self.corpus, self.seed = corpus, seed
        self.texts: dict[str, TextFamily] = {
            name: corpus.text_family(fingerprint, corpus.num_units)
            for name, fingerprint in fingerprints.items()
        }
        samples = corpus.units.column("samples").to_numpy()
        self.before = np.concatenate([[0], np.cumsum(samples)]).astype(np.int64)
        if not self.before[-1]:
            raise InputError(
                f"{corpus.folder.location}: the corpus has no samples, so no captions to draw"
            )

    def drawn(self, number: int, count: int) -> list[Caption]:
        """`count` captions of round `number`, every sample as likely as any other."""
        places = np.arange(count)
        rank = (
            draw(self.seed, Purpose.PROMPT, number, places) % np.uint64(self.before[-1])
        ).astype(np.int64)
        pick = draw(self.seed, Purpose.CAPTION, number, places)
        units = np.searchsorted(self.before, rank, side="right") - 1
        captions: list[Caption] = [Caption(0, 0, "", {})] * count

        # Unit by unit, because a unit is one file: its samples are read once.
        for unit in np.unique(units).tolist():
            own = np.flatnonzero(units == unit)
            samples = self.corpus.samples(unit).take(rank[own] - self.before[unit])
            texts = self.corpus.captions(unit).column("text")
            for place, sample in zip(own.tolist(), samples.to_pylist()):
                chosen = sample["captions"][int(pick[place] % np.uint64(len(sample["captions"])))][
                    "index"
                ]
                record = {**json.loads(sample["meta"]), "prompt": texts[chosen].as_py()}
                captions[place] = Caption(unit, chosen, sample["key"], record)
        return captions

    def states(self, captions: Sequence[Caption]) -> dict[str, TextStates]:
        """The captions' states per encoder, on the CPU, as `TextStates.collate` has them."""
        found = {}
        for name, family in self.texts.items():
            for unit in {caption.unit for caption in captions}:
                family.verify_unit(unit)
            rows = [family.read(caption.unit, [caption.index])[0] for caption in captions]
            found[name] = TextStates.collate(rows, family.shared().prefix)
        return found
