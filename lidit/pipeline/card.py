"""The README.md of a saved model: what it is, what it was trained on and with, how to use it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from lidit.hub import is_hub_id
from lidit.models import LIDiT
from lidit.pipeline.model_encoder import ModelEncoder
from lidit.pipeline.settings import PipelineSettings

SCORE_HEAD = "| measure | value |\n|---|---|\n"
FENCE = "```json\n{}\n```"
PROMPT = "a photo of a cat"  # where no prompt of the training is known
# What the front matter says, of the facts; the rest is shown as the run's own.
NAMED = {"scores", "license", "datasets", "prompts"}
DIGITS = 12  # of a fingerprint, as in a family's folder name


def model_card(
    model: LIDiT,
    encoders: Sequence[ModelEncoder],
    settings: PipelineSettings,
    facts: Mapping[str, Any],
) -> str:
    """Markdown with the front matter that model hubs read.

    facts: the run's own (corpus digest, recipe); besides them `scores` (name -> value), `license`
    and `datasets` in the hub's words, and `prompts` that the model was trained for, of which the
    first is the example.
    """
    objective, sampler, codec = settings.objective, settings.sampler, settings.codec
    rows = "\n".join(
        f"| {e.name} | {e.settings.model} | {e.spec['blocks']} of {e.spec['total_blocks']} | "
        f"{e.spec['instruction'] or '(none)'} | {e.spec['storage']} | `{e.fingerprint[:DIGITS]}` |"
        for e in encoders
    )
    shape = model.config
    prompt = json.dumps(next(iter(facts.get("prompts") or ()), PROMPT), ensure_ascii=False)
    scores = "\n".join(f"| {name} | {value} |" for name, value in facts.get("scores", {}).items())
    other = {key: value for key, value in facts.items() if key not in NAMED}
    run = json.dumps(other, indent=1, sort_keys=True, default=str)
    return f"""---
{front_matter(encoders, facts)}
---
# LI-DiT, {model.num_parameters() / 1e6:.1f}M parameters

A text-to-image diffusion transformer whose prompts are encoded by {len(encoders)} frozen LLM{"s"[: len(encoders) != 1]}
(LI-DiT, arXiv 2406.11831). Depth {shape.depth}, width {shape.width}, {shape.heads} heads, patch {shape.patch_size};
token refiner of {shape.refiner_depth} blocks, fusion "{shape.fusion_mode}".

```python
from lidit import LIDiTPipeline

pipe = LIDiTPipeline.from_pretrained("this/folder")
image = pipe({prompt}, height={settings.height}, width={settings.width}, seed=0).images[0]
```

With the package lidit-pipeline installed (`pip install .` in its checkout) diffusers loads it, too:
`DiffusionPipeline.from_pretrained("this/folder", custom_pipeline="this/folder", trust_remote_code=True)`. The code that
it asks to be trusted is this folder's pipeline.py, which only imports lidit: read it first, or use the lines above.

## Encoders
The states a prompt is turned into must be the ones of the training; an LLM with another fingerprint is refused.

| name | model | block | instruction | storage | fingerprint |
|---|---|---|---|---|---|
{rows}

## Training
Objective `{objective.kind}`; codec `{codec.name}`; {settings.height} x {settings.width} pixels.
Sampling by default: {sampler.steps} steps, scheduler {sampler.scheduler}, guidance {sampler.guidance_scale}.
{_section("Licence", _licence(facts))}
{_section("Scores", SCORE_HEAD + scores if scores else "")}
{_section("Run", FENCE.format(run) if other else "")}"""  # noqa: E501


def front_matter(encoders: Sequence[ModelEncoder], facts: Mapping[str, Any]) -> str:
    """The card's metadata as YAML, in the hub's fields."""
    licence = facts.get("license")
    data = ModelCardData(
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=["text-to-image", "lidit"],
        license=licence or "other",
        license_name=None if licence else "not-named",
        base_model=[e.settings.model for e in encoders if is_hub_id(e.settings.model)] or None,
        datasets=list(facts.get("datasets") or ()) or None,
        metrics=sorted(facts.get("scores", {})) or None,
        model_name="LI-DiT",
        eval_results=[_result(name, value) for name, value in facts.get("scores", {}).items()]
        or None,
        widget=[{"text": prompt} for prompt in facts.get("prompts") or ()] or None,
    )
    return str(data.to_yaml())


def _result(name: str, value: Any) -> EvalResult:
    return EvalResult(
        task_type="text-to-image",
        dataset_type="lidit",
        dataset_name="lidit evaluate",
        metric_type=name,
        metric_value=value,
    )


def _licence(facts: Mapping[str, Any]) -> str:
    if facts.get("license"):
        return f"`{facts['license']}`. The LLMs and the training data have terms of their own."
    return (
        "The owner of this model has not named a licence: set `license` above before it is "
        "published. "
        "The LLMs and the training data have terms of their own."
    )


def _section(title: str, body: str) -> str:
    return f"\n## {title}\n{body}\n" if body else ""
