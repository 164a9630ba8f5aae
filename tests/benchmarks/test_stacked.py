"""A stack of models against the same models, each trained alone by a plain loop."""

from __future__ import annotations

import pytest
import torch

from benchmarks.gpu.resident import ResidentCorpus
from benchmarks.gpu.stacked import Stack, encoder_name
from lidit.config import LoopSettings, ModelSettings, ObjectiveSettings
from lidit.data.assembler import TrainingBatch
from lidit.data.feed import open_feed
from lidit.diffusion import Objective, build_objective
from lidit.models import LIDiT, TextStates
from pipelines.training.schedule import learning_rate
from tests.helpers.trained import SmallWorld

STEPS, SIZE, WIDTHS = 4, 3, (16, 24)
SETTINGS = LoopSettings.model_validate(
    {
        "steps": STEPS,
        "ema_decay": 0.9,
        "optimizer": {"lr": 3e-3, "weight_decay": 0.01, "gradient_clip": 0.05},
    }
)


def batch_of(seed: int, step: int, names: tuple[str, str]) -> TrainingBatch:
    generator = torch.Generator().manual_seed(100 * seed + step)
    draw = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    tokens = 3 + (seed + step) % 3
    mask = torch.arange(tokens)[None] < torch.randint(1, tokens + 1, (SIZE, 1), generator=generator)
    text = {
        name: TextStates(draw(SIZE, tokens, width), mask, draw(2, width))
        for name, width in zip(names, WIDTHS)
    }
    u = torch.rand(SIZE, generator=generator)
    keys = tuple(str(row) for row in range(SIZE))
    return TrainingBatch(
        step, keys, draw(SIZE, 3, 8, 8), draw(SIZE, 3, 8, 8), u, text, int(mask.sum())
    )


def model_of(seed: int, names: tuple[str, ...]) -> LIDiT:
    torch.manual_seed(seed)
    settings = ModelSettings.model_validate(
        {"width": 32, "depth": 2, "heads": 2, "patch_size": 4, "refiner": {"depth": 1}}
    )
    model = LIDiT.from_settings(settings, dict(zip(names, WIDTHS)), 3)
    for name, width in zip(names, WIDTHS):
        model.conditioner.set_statistics(
            name, torch.full((width,), 0.1 * seed), torch.full((width,), 1.0 + seed)
        )
    return model.train()


def alone(
    seed: int, names: tuple[str, str], objective: Objective
) -> tuple[list[float], LIDiT, dict[str, torch.Tensor]]:
    """Losses, the trained model, its averaged weights."""
    model, choice, losses = model_of(seed, names), SETTINGS.optimizer, []
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=choice.lr, betas=choice.betas, weight_decay=choice.weight_decay
    )
    average = {name: value.detach().clone() for name, value in model.named_parameters()}
    for step in range(STEPS):
        batch = batch_of(seed, step, names)
        t = objective.timesteps(batch.u)
        noisy = objective.add_noise(batch.latents, batch.noise, t)
        loss = objective.loss(
            model(noisy, t, batch.text), batch.latents, batch.noise, t, noisy
        ).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), choice.gradient_clip)
        optimizer.param_groups[0]["lr"] = learning_rate(SETTINGS, step)
        optimizer.step()
        decay = min(SETTINGS.ema_decay, (step + 1) / (step + 10))
        for name, value in model.named_parameters():
            average[name].lerp_(value.detach(), 1 - decay)
        losses.append(loss.item())
    return losses, model, average


@pytest.mark.parametrize("kind", ["clean", "ddpm"])
def test_a_stack_trains_each_model_as_if_it_were_alone(kind: str) -> None:
    objective = build_objective(ObjectiveSettings.model_validate({"kind": kind}))
    # the third arm's encoders have other names
    arms = [(1, ("a", "b")), (2, ("a", "b")), (3, ("bare", "c"))]
    canonical = tuple(encoder_name(place) for place in range(2))
    stack = Stack(
        [model_of(seed, canonical) for seed, _ in arms], objective, SETTINGS, torch.device("cpu")
    )
    losses = [
        stack.step([batch_of(seed, step, names) for seed, names in arms]) for step in range(STEPS)
    ]
    for index, (seed, names) in enumerate(arms):
        expected, model, average = alone(seed, names, objective)
        assert [float(step[index]) for step in losses] == pytest.approx(expected, rel=1e-4)
        found = stack.averaged(index)
        # Adam's first steps follow the signs of gradients: where one is zero but for rounding,
        # signs may differ.
        for (name, value), (_, other) in zip(
            found.named_parameters(), average.items(), strict=True
        ):
            near = torch.isclose(value, other, rtol=1e-3, atol=1e-4).float().mean()
            assert near > 0.99, f"{name}: {near}"
        assert not torch.equal(
            found.conditioner.branches[0].projection.mean, torch.zeros(WIDTHS[0])
        )
        assert torch.equal(
            found.conditioner.branches[0].projection.mean,
            model.conditioner.branches[0].projection.mean,
        )


def test_a_corpus_on_the_device_feeds_what_the_feed_does(small_world: SmallWorld) -> None:
    recipe = small_world.recipe(
        small_world.folder / "none", data={"window_units": 2, "caption_dropout": 0.3}
    )
    corpus = small_world.open()
    texts = {name: corpus.text_family(name).fingerprint for name in ("llama", "qwen2")}
    data = ResidentCorpus(
        str(small_world.corpus), corpus.latent_family("pixels").fingerprint, torch.device("cpu")
    )
    feed = data.feed(recipe, texts)
    expected = open_feed(corpus, recipe.data, batch_size=recipe.train.batch_size).batches(0, 10)
    for step, right in enumerate(expected):
        found = feed.batch(step)
        assert found.keys == right.keys
        assert torch.equal(found.latents, right.latents)
        assert torch.equal(found.u, right.u)
        for name, states in right.text.items():
            mine = found.text[name]
            assert torch.equal(mine.mask.sum(1), states.mask.sum(1))
            assert torch.equal(mine.states[mine.mask], states.states[states.mask].float())
            assert torch.equal(mine.prefix, states.prefix.float())
        assert torch.equal(found.noise, feed.batch(step).noise)
        assert not torch.equal(found.noise, feed.batch(step + 1).noise)
