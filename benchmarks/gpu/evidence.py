"""The arms of an ablation in minutes of one GPU, without Ray: all arms and seeds of one shape are
one stack of models.

    python -m benchmarks.gpu.evidence prepare ablate-gpu BUNDLE recipe.train.steps=30000
    scenes.count=300 python -m benchmarks.gpu.evidence train BUNDLE --seconds 540 lidit ablate
    ablate-gpu recipe.output=BUNDLE recipe.corpus=BUNDLE/corpus recipe.train.steps=30000
    scenes.count=300

The first makes scenes, corpus and states on a machine with everything; BUNDLE then holds what the
second needs: it runs where torch, diffusers, pydantic and pyarrow are, and leaves results where the
third finds them finished and writes the report. Give the third the words of the first.
BUNDLE/corpus and BUNDLE/NAME/cases are to stay below 40 MiB.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.resident import ResidentCorpus
from benchmarks.gpu.stacked import Stack, encoder_name
from lidit.config.ablation import Ablation
from lidit.diffusion import build_objective
from lidit.errors import InputError
from lidit.evals.ablation.results import ArmResult
from lidit.models import LIDiT
from pipelines.ablation.eval_set import EvalSet, points_of

MOST_BYTES = 40 * 2**20
JOBS, SETTINGS = "jobs.json", "ablation.json"


@dataclass(frozen=True)
class Arm:
    """One arm with one seed, as `prepare` found it; texts: encoder -> fingerprint."""

    arm: str
    seed: int
    identity: str
    texts: dict[str, str]
    latents: str
    points: int


def prepare(name: str, bundle: Path, overrides: Sequence[str]) -> int:
    """Everything but the training; the bytes that a GPU's machine needs."""
    from lidit.config.shipped import load_ablation
    from pipelines.ablation.ablate import prepare_arms

    places = [f"recipe.output={bundle}", f"recipe.corpus={bundle / 'corpus'}"]
    ablation = load_ablation(name, [*overrides, *places])
    jobs = [
        Arm(job.arm, job.seed, job.identity, job.texts, job.latents, job.points).__dict__
        for job in prepare_arms(ablation)
    ]
    (bundle / JOBS).write_text(json.dumps(jobs))
    (bundle / SETTINGS).write_text(ablation.model_dump_json())
    carried = [bundle / "corpus", bundle / ablation.recipe.name / "cases"]
    return sum(
        path.stat().st_size for folder in carried for path in folder.rglob("*") if path.is_file()
    )


def train(bundle: Path, device: torch.device, seconds: float) -> list[dict[str, Any]]:
    """Train and measure every arm without a result, stack by stack; a line for each stack.

    A stack is begun only while there is time for as long as the slowest one so far has taken.
    """
    ends, slowest, lines = time.monotonic() + seconds, 0.0, []
    tree = json.loads((bundle / SETTINGS).read_text())
    tree["recipe"] |= {"output": str(bundle), "corpus": str(bundle / "corpus")}
    ablation = Ablation.model_validate(tree)
    arms = [Arm(**entry) for entry in json.loads((bundle / JOBS).read_text())]
    pending = [arm for arm in arms if ArmResult.load(_folder(ablation, arm)) is None]
    if not pending:
        return lines
    data = ResidentCorpus(ablation.recipe.corpus, pending[0].latents, device)
    eval_set = EvalSet.of(ablation, ablation.recipe.run_folder / "cases")
    torch.set_float32_matmul_precision("high")
    for stack in stacks(ablation, pending, data):
        if time.monotonic() + slowest > ends:
            lines.append(
                {
                    "skipped": [f"{arm.arm} {arm.seed}" for arm in stack],
                    "slowest": round(slowest, 1),
                }
            )
            continue
        began = time.monotonic()
        train_stack(ablation, stack, data, eval_set)
        slowest = max(slowest, time.monotonic() - began)
        lines.append({"trained": len(stack), "arms": sorted({arm.arm for arm in stack}),
                      "seconds": round(time.monotonic() - began, 1)})  # fmt: skip
        print(json.dumps(lines[-1]), flush=True)
    return lines


def stacks(ablation: Ablation, arms: Sequence[Arm], data: ResidentCorpus) -> list[list[Arm]]:
    """Arms whose networks have one shape, the largest stacks first."""
    found: dict[str, list[Arm]] = {}
    for arm in arms:
        recipe = ablation.arm_recipe(arm.arm, arm.seed)
        shape = [
            recipe.model.model_dump(mode="json"),
            _widths(arm, data),
            [len(t.prefix) for t in _texts(arm, data)],
        ]
        found.setdefault(json.dumps(shape, sort_keys=True), []).append(arm)
    return sorted(found.values(), key=len, reverse=True)


def _texts(arm: Arm, data: ResidentCorpus) -> list[Any]:
    return [data.text(arm.texts[name]) for name in sorted(arm.texts)]


def _widths(arm: Arm, data: ResidentCorpus) -> dict[str, int]:
    return {
        encoder_name(place): text.prefix.shape[-1] for place, text in enumerate(_texts(arm, data))
    }


def _folder(ablation: Ablation, arm: Arm) -> Path:
    return ablation.arm_recipe(arm.arm, arm.seed).run_folder


def start_model(ablation: Ablation, arm: Arm, data: ResidentCorpus) -> LIDiT:
    """The arm's network before its first step: the weights that `lidit ablate` starts it with."""
    recipe = ablation.arm_recipe(arm.arm, arm.seed)
    torch.manual_seed(recipe.data.seed)
    model = LIDiT.from_settings(recipe.model, _widths(arm, data), data.latents.shape[1])
    for place, text in enumerate(_texts(arm, data)):
        model.conditioner.set_statistics(encoder_name(place), text.mean, text.deviation)
    return model.train()


def train_stack(
    ablation: Ablation, arms: Sequence[Arm], data: ResidentCorpus, eval_set: EvalSet
) -> None:
    """Train arms of one shape and save their results. Raises InputError where a loss
    is not finite.
    """
    recipes = [ablation.arm_recipe(arm.arm, arm.seed) for arm in arms]
    models = [start_model(ablation, arm, data) for arm in arms]
    objective, images, started = (
        build_objective(recipes[0].objective),
        eval_set.images(),
        time.monotonic(),
    )
    stack = Stack(models, objective, recipes[0].train, data.device)
    feeds = [data.feed(recipe, arm.texts) for recipe, arm in zip(recipes, arms, strict=True)]
    due, losses, points = set(points_of(recipes[0], arms[0].points)), [], [[] for _ in arms]
    for step in range(1, recipes[0].train.steps + 1):
        found = stack.step([feed.batch(step - 1) for feed in feeds])
        if step % recipes[0].train.log_every == 0 or step in due:
            losses.append((step, found))
        if step not in due:
            continue
        if not bool(torch.isfinite(found).all()):
            bad = [
                f"{arm.arm} seed {arm.seed}"
                for arm, loss in zip(arms, found.tolist())
                if not loss < float("inf")
            ]
            raise InputError(f"step {step}: the loss of {', '.join(bad)} is not finite")
        for index, arm in enumerate(arms):
            named = {
                encoder_name(place): arm.texts[name] for place, name in enumerate(sorted(arm.texts))
            }
            loss = eval_set.loss(stack.averaged(index), objective, data.corpus, named)
            points[index].append(eval_set.measure(loss, images, step))

    seconds = (time.monotonic() - started) / len(arms)
    curves = [(step, found.tolist()) for step, found in losses]
    for index, (arm, recipe) in enumerate(zip(arms, recipes, strict=True)):
        curve = tuple((step, values[index]) for step, values in curves)
        count = models[index].num_parameters()
        ArmResult(
            arm.identity, arm.arm, arm.seed, count, seconds, curve, tuple(points[index])
        ).save(recipe.run_folder)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    making = commands.add_parser("prepare")
    making.add_argument("name")
    making.add_argument("bundle", type=Path)
    making.add_argument("overrides", nargs="*")
    training = commands.add_parser("train")
    training.add_argument("bundle", type=Path)
    training.add_argument("--seconds", type=float, default=540)
    training.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    given = parser.parse_args()
    if given.command == "train":
        print(json.dumps(train(given.bundle.resolve(), torch.device(given.device), given.seconds)))
        return
    carried = prepare(given.name, given.bundle.resolve(), given.overrides)
    print(json.dumps({"bytes": carried, "fits": carried <= MOST_BYTES}))
    if carried > MOST_BYTES:
        raise SystemExit(
            f"{carried / 2**20:.0f} MiB are too many to carry; give fewer scenes (scenes.count)"
        )


if __name__ == "__main__":
    main()
