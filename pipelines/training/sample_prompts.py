"""States of a run's fixed prompts, computed once before training, so that no trainer ever loads an LLM.

Where a trainer will be: the pools that embedded the corpus may be on another cluster, or gone.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import ray
import torch
from safetensors.torch import load_file, save

from lidit.config import EncoderSettings, Recipe
from lidit.store import digest_of
from lidit.store.files.atomic import publish_bytes
from lidit.store.files.folder import Folder
from lidit.text import PromptEncoder, resolve_encoder
from pipelines.runtime import resources


def prompt_states(recipe: Recipe, prompts: Sequence[str], folder: Path) -> dict[str, list[torch.Tensor]]:
    """States [tokens, width] of each prompt per encoder, kept in `folder` for the next start of the run."""
    found: dict[str, list[torch.Tensor]] = {}
    missing = []
    for encoder in recipe.encoders if prompts else ():
        path = folder / f"{encoder.name}-{digest_of([encoder.model_dump(mode='json'), list(prompts)])[:12]}.safetensors"
        if path.exists():
            tensors = load_file(path)
            found[encoder.name] = [tensors[str(index)] for index in range(len(prompts))]
        else:
            missing.append((encoder, path))
    if missing:
        resources.connect()
        folder.mkdir(parents=True, exist_ok=True)
    for encoder, path in missing:
        task = _encode.options(**resources.demands(resources.worker_pool(recipe.engine)))
        with resources.plain_errors(f"the process that encodes the sample prompts with {encoder.name} died"):
            found[encoder.name] = ray.get(task.remote(encoder, list(prompts)))
        content = save({str(index): states for index, states in enumerate(found[encoder.name])})
        publish_bytes(Folder.at(folder), path.name, content)
    return found


@ray.remote
def _encode(settings: EncoderSettings, prompts: list[str]) -> list[torch.Tensor]:
    encoder = PromptEncoder.load(resolve_encoder(settings))
    return [caption.states.clone() for caption in encoder.encode(prompts)]
