"""The README.md of a saved model: what it is, what it was trained on and with, how to use it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from lidit.models import LIDiT
from lidit.pipeline.model_encoder import ModelEncoder
from lidit.pipeline.settings import PipelineSettings

SCORE_HEAD = "| measure | value |\n|---|---|\n"
FENCE = "```json\n{}\n```"


def model_card(
    model: LIDiT, encoders: Sequence[ModelEncoder], settings: PipelineSettings, facts: Mapping[str, Any]
) -> str:
    """Markdown with the front matter model hubs read. `facts` are the run's own (corpus digest, recipe, scores)."""
    objective, sampler, codec = settings.objective, settings.sampler, settings.codec
    rows = "\n".join(
        f"| {e.name} | {e.settings.model} | {e.spec['blocks']} of {e.spec['total_blocks']} | "
        f"{e.spec['instruction'] or '(none)'} | {e.spec['storage']} | `{e.fingerprint}` |"
        for e in encoders
    )
    shape = model.config
    scores = "\n".join(f"| {name} | {value} |" for name, value in facts.get("scores", {}).items())
    other = {key: value for key, value in facts.items() if key != "scores"}
    run = json.dumps(other, indent=1, sort_keys=True, default=str)
    return f"""---
library_name: diffusers
pipeline_tag: text-to-image
tags: [text-to-image, lidit]
---
# LI-DiT, {model.num_parameters() / 1e6:.1f}M parameters

A text-to-image diffusion transformer whose prompts are encoded by {len(encoders)} frozen LLM{"s"[: len(encoders) != 1]}
(LI-DiT, arXiv 2406.11831). Depth {shape.depth}, width {shape.width}, {shape.heads} heads, patch {shape.patch_size};
token refiner of {shape.refiner_depth} blocks, fusion "{shape.fusion_mode}".

```python
from lidit.pipeline import LIDiTPipeline

pipe = LIDiTPipeline.from_pretrained("this/folder")
image = pipe("a red cube on a blue sphere", height={settings.height}, width={settings.width}, seed=0)[0]
```

## Encoders
The states a prompt is turned into must be the ones of the training; an LLM with another fingerprint is refused.

| name | model | block | instruction | storage | fingerprint |
|---|---|---|---|---|---|
{rows}

## Training
Objective `{objective.kind}`; codec `{codec.name}`; {settings.height} x {settings.width} pixels.
Sampling by default: {sampler.steps} steps, scheduler {sampler.scheduler}, guidance {sampler.guidance_scale}.
{_section("Scores", SCORE_HEAD + scores if scores else "")}
{_section("Run", FENCE.format(run) if other else "")}"""


def _section(title: str, body: str) -> str:
    return f"\n## {title}\n{body}\n" if body else ""
