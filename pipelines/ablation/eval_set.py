"""What every arm is judged by: scenes no arm trains on, true and wrong captions, their states."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save

from lidit.codecs import load_codec
from lidit.config import CodecSettings, EncoderSettings, Recipe
from lidit.config.ablation import Ablation
from lidit.diffusion import Objective
from lidit.evals.ablation.results import Measured, Point
from lidit.evals.classifier.binding import Case, Measure, generate_cases, measure_binding, pixels
from lidit.evals.classifier.caption_loss import CaptionLoss
from lidit.models import LIDiT
from lidit.pipeline.model_encoder import ModelEncoder
from lidit.store import Corpus, digest_of
from lidit.store.files.atomic import publish_bytes
from lidit.store.files.folder import Folder
from lidit.text.specs import default_device

# no training set is generated with it; all arms and seeds meet the same cases
CASE_SEED = 1_000_003
IMAGES_AT_ONCE = 64


@dataclass(frozen=True)
class EvalSet:
    """`measures`: name ("binding, clauses") -> cases. `folder` keeps the captions' states; small
    and picklable.
    """

    folder: Path
    measures: dict[str, list[Case]]
    codec: CodecSettings
    batch_size: int

    @classmethod
    def of(cls, ablation: Ablation, folder: Path) -> EvalSet:
        """The cases of an ablation. Raises InputError for a category that the kinds or styles do
        not fit.
        """
        scenes, settings = ablation.scenes, ablation.measures
        measures = {
            f"{kind}, {style}": generate_cases(
                Measure(kind, settings.tag, style),
                settings.scenes,
                scenes.size,
                scenes.layout,
                CASE_SEED,
            )
            for kind in settings.kinds
            for style in scenes.styles
        }
        return cls(folder, measures, ablation.recipe.codec, settings.batch_size)

    @property
    def captions(self) -> list[str]:
        cases = [case for group in self.measures.values() for case in group]
        return list(dict.fromkeys(text for case in cases for text in (case.caption, case.wrong)))

    @property
    def digest(self) -> str:
        return digest_of(
            {name: [[c.caption, c.wrong] for c in cases] for name, cases in self.measures.items()}
        )

    def encode(self, corpus: Corpus, settings: EncoderSettings, fingerprint: str) -> None:
        """Compute and keep the captions' states by one LLM, rounded as the corpus's family stores
        them.
        """
        path = self._path(fingerprint)
        if path.exists():
            return
        encoder = ModelEncoder.of_family(settings, corpus.text_family(fingerprint))
        rows = encoder.encode(self.captions, default_device())
        path.parent.mkdir(parents=True, exist_ok=True)
        content = save({str(number): row.contiguous() for number, row in enumerate(rows)})
        publish_bytes(Folder.at(self.folder), path.name, content)

    def loss(
        self, model: LIDiT, objective: Objective, corpus: Corpus, fingerprints: dict[str, str]
    ) -> CaptionLoss:
        """The model's loss under any caption of the set. `fingerprints`: encoder -> text family."""
        captions = self.captions
        rows, prefixes = {}, {}
        for name, fingerprint in fingerprints.items():
            states = load_file(self._path(fingerprint))
            rows[name] = {caption: states[str(number)] for number, caption in enumerate(captions)}
            prefixes[name] = corpus.text_family(fingerprint).shared().prefix
        return CaptionLoss(model, objective, rows, prefixes)

    def images(self) -> dict[str, torch.Tensor]:
        """Latents of the cases' scenes per measure, on the CPU."""
        codec = load_codec(self.codec)
        return {
            name: torch.cat(
                [codec.encode(part).mean for part in pixels(cases).split(IMAGES_AT_ONCE)]
            )
            for name, cases in self.measures.items()
        }

    def measure(self, loss: CaptionLoss, images: dict[str, torch.Tensor], step: int) -> Point:
        """Every measure and the validation loss of a model at `step`."""
        measured, losses = {}, []
        for name, cases in self.measures.items():
            result = measure_binding(loss, cases, images[name], batch_size=self.batch_size)
            by_position = tuple(result.by_position[i].value for i in sorted(result.by_position))
            measured[name] = Measured(result.accuracy.value, result.gap.value, by_position)
            losses.append(result.true_loss)
        means = {f"{t:g}": sum(group[t].value for group in losses) / len(losses) for t in losses[0]}
        return Point(step, measured, means)

    def _path(self, fingerprint: str) -> Path:
        return self.folder / f"{fingerprint[:12]}-{self.digest[:12]}.safetensors"


def points_of(recipe: Recipe, count: int) -> Sequence[int]:
    """The steps at which an arm is measured: `count` equal parts of its training, the last step
    among them.
    """
    return sorted({max(1, recipe.train.steps * (i + 1) // count) for i in range(count)})
