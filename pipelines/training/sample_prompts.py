"""Sample grids: images of a run's fixed prompts, sampled as it trains.

The driver has the prompts encoded once before training, so that no trainer ever loads an LLM; rank
0 samples from the kept states. They are encoded and rounded as the corpus stores states, so the
grids show what the published model does.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import ray
import torch
from safetensors.torch import load_file, save

from lidit.codecs import load_codec
from lidit.config import EncoderSettings, Recipe
from lidit.data.families import Families
from lidit.diffusion import GuidedPredictor, Objective, initial_noise, sample, seeded_generators
from lidit.grids import labelled_grid
from lidit.models import LIDiT, TextStates
from lidit.pipeline.model_encoder import ModelEncoder
from lidit.pixels import unit_to_bytes
from lidit.store import Corpus, digest_of
from lidit.store.files.atomic import publish_bytes
from lidit.store.files.folder import Folder
from pipelines.runtime import resources

PromptStates = Mapping[str, list[torch.Tensor]]  # encoder -> states [T, W] of each prompt


def prompt_states(
    recipe: Recipe, corpus: Corpus, fingerprints: Mapping[str, str], folder: Path
) -> dict[str, list[torch.Tensor]]:
    """States [T, W] of each of the recipe's sample prompts per encoder.

    fingerprints: encoder -> text family. folder: keeps the states for the run's next start.
    Raises InputError for an LLM that is not the one of its family.
    """
    prompts = list(recipe.train.sample_prompts)
    known: dict[str, list[torch.Tensor]] = {}
    for encoder in recipe.encoders if prompts else ():
        fingerprint = fingerprints[encoder.name]
        path = folder / f"{encoder.name}-{digest_of([fingerprint, prompts])[:12]}.safetensors"
        if not path.exists():
            rows = _encode_on_cluster(recipe, encoder, corpus.folder.location, fingerprint)
            folder.mkdir(parents=True, exist_ok=True)
            publish_bytes(
                Folder.at(folder), path.name, save({str(i): row for i, row in enumerate(rows)})
            )
        tensors = load_file(path)
        known[encoder.name] = [tensors[str(index)] for index in range(len(prompts))]
    return known


def _encode_on_cluster(
    recipe: Recipe, encoder: EncoderSettings, corpus: str, fingerprint: str
) -> list[torch.Tensor]:
    """Encode where a trainer will be: the pools that embedded the corpus may be gone."""
    resources.connect()
    task = _encode.options(**resources.demands(resources.worker_pool(recipe.engine)))
    with resources.plain_errors(
        f"the process that encodes the sample prompts with {encoder.name} died"
    ):
        rows: list[torch.Tensor] = ray.get(
            task.remote(encoder, corpus, fingerprint, list(recipe.train.sample_prompts))
        )
    return rows


@ray.remote
def _encode(
    settings: EncoderSettings, corpus: str, fingerprint: str, prompts: list[str]
) -> list[torch.Tensor]:
    encoder = ModelEncoder.of_family(
        settings, Corpus.open(corpus).text_family(fingerprint, rolling=True)
    )
    # Cloned: a view would carry the states of the whole batch with it.
    return [row.clone() for row in encoder.encode(prompts)]


@torch.no_grad()
def sample_grid(
    model: LIDiT,
    objective: Objective,
    recipe: Recipe,
    prompts: PromptStates,
    families: Families,
    path: Path,
) -> None:
    """Write a labelled grid of the recipe's sample prompts, always from the same noise."""
    device = next(model.parameters()).device
    shared = {name: families.texts[name].shared() for name in prompts}
    text = {
        name: TextStates.collate(rows, shared[name].prefix).to(device)
        for name, rows in prompts.items()
    }
    empty = {
        name: TextStates.collate([it.empty], it.prefix).to(device) for name, it in shared.items()
    }

    # A seed per prompt, not per step: two grids differ by what the model learned between them.
    labels = list(recipe.train.sample_prompts)
    noise = initial_noise(seeded_generators(range(len(labels))), families.latent_shape, device)
    latents = sample(
        GuidedPredictor(model, text, empty, recipe.sampler), objective, noise, recipe.sampler
    )

    pixels = unit_to_bytes(load_codec(recipe.codec).decode(latents))
    path.parent.mkdir(exist_ok=True)
    labelled_grid(list(pixels.permute(0, 2, 3, 1).cpu().numpy()), labels).save(path)
