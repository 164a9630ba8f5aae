"""Sizes: the paper's models have the parameters their names promise, and the documentation says how
many.
"""

import re
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lidit.config import ModelSettings
from lidit.models import LIDiT
from lidit.models.flops import forward_flops
from lidit.models.presets import PRESETS

DOCUMENT = Path(__file__).parents[2] / "docs" / "model.md"
PAPER_LLMS = {"llama3": 4096, "qwen1.5": 4096}
PIXELS = {"smollm2": 576, "gemma3": 640}


def on_meta(preset: str) -> LIDiT:
    encoders, channels = (PIXELS, 3) if preset == "tiny" else (PAPER_LLMS, 16)
    with torch.device("meta"):
        return LIDiT.from_settings(ModelSettings(preset=preset), encoders, channels)


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(("preset", "billions"), [("1B", 1), ("10B", 10)])
def test_parameters_are_within_ten_percent_of_the_name(preset, billions):
    assert abs(count(on_meta(preset)) / (billions * 1e9) - 1) < 0.1


@pytest.mark.parametrize("preset", list(PRESETS))
def test_the_documented_counts_are_the_models(preset):
    model = on_meta(preset)
    conditioner, transformer = model.conditioner, model.transformer
    row = next(
        line for line in DOCUMENT.read_text().splitlines() if line.startswith(f"| {preset} |")
    )
    numbers = [float(text.replace(",", "")) for text in re.findall(r"[\d,]+\.\d+", row)]
    expected = [
        sum(count(branch.projection) + count(branch.condition) for branch in conditioner.branches),
        sum(count(branch.refiner) for branch in conditioner.branches),
        count(conditioner.fusion),
        count(transformer.blocks),
        count(transformer.position),
        count(model),
    ]
    assert numbers == [pytest.approx(value / 1e6, abs=0.06) for value in expected]


def test_single_values_override_the_preset():
    model = LIDiT.from_settings(ModelSettings(preset="tiny", width=64, depth=2), PIXELS, 3)
    config = model.config
    assert (config.width, config.depth, config.heads, config.patch_size) == (64, 2, 4, 8)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"refiner": {"depth": 1}, "fusion": {"depth": 2}},
        {"refiner": {"gated": False}},
        {"fusion": {"mode": "concatenation"}},
        {"visible_tokens": 5},
    ],
)
@pytest.mark.parametrize("encoders", [2, 3])
def test_flops_are_what_torch_counts(make_model, make_text, settings, encoders):
    model, text = make_model(encoders, **settings), make_text(lengths=(6,), count=encoders)
    # the counter does not know the CPU's fused attention: the plain one is two matrix products it
    # can see
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(torch.randn(1, 3, 8, 12), torch.rand(1), text)
    captions = {name: entry.states.shape[1] for name, entry in text.items()}
    prefixes = {name: len(entry.prefix) for name, entry in text.items()}
    once = sum(2 * prefixes[name] * width * 32 for name, width in model.config.encoders.items())
    assert (
        sum(forward_flops(model, (8, 12), captions, prefixes).values()) + once
        == counter.get_total_flops()
    )
