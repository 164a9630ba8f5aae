"""The control of the refiner's mechanism: hide the tokens that carry the binding and see who still
knows it.

Caption: "a circle and a square; the circle is red ...". The transformer's cross-attention and its
pooled text may see only the first five tokens, which under a causal LLM know nothing of the
colours; the refiner sees all of them. Only a refiner with full attention can carry the colours
back; with a causal refiner, or none, the loss cannot depend on them.
"""

from dataclasses import replace

import pytest
import torch

from lidit.config import ObjectiveSettings
from lidit.diffusion import build_objective
from lidit.models import LIDiT

VISIBLE = 5
OPEN = {"gated": False}  # gates fixed at 1; the adaptive gates read the mean of the whole caption
CONTROL = {"visible_tokens": VISIBLE, "fusion": {"mode": "none"}}


def loss_gap(model, text) -> float:
    """Largest difference of the loss between a caption and the same one with its
    colours swapped.
    """
    entry = text["first"]
    swapped = entry.states.clone()
    swapped[:, VISIBLE:] = swapped[:, VISIBLE:].flip(1)
    objective = build_objective(ObjectiveSettings(kind="clean"))
    x0, noise = torch.randn(4, 3, 8, 8), torch.randn(4, 3, 8, 8)
    t = torch.tensor([0.5, 0.7, 0.85, 0.95])
    x_t = objective.add_noise(x0, noise, t)
    losses = [
        objective.loss(model(x_t, t, {"first": replace(entry, states=states)}), x0, noise, t, x_t)
        for states in (entry.states, swapped)
    ]
    return (losses[0] - losses[1]).abs().max().item()


@pytest.mark.parametrize(
    "refiner",
    [{**OPEN, "causal": True}, {**OPEN, "mixing": False}, {"depth": 0}],
    ids=["causal", "own", "none"],
)
def test_no_refiner_or_a_causal_one_cannot_carry_what_is_hidden(make_model, make_text, refiner):
    model = make_model(1, refiner=refiner, **CONTROL)
    assert loss_gap(model, make_text(lengths=(12,) * 4, count=1)) == 0.0


def test_full_attention_carries_it(make_model, make_text):
    model = make_model(1, refiner=OPEN, **CONTROL)
    assert loss_gap(model, make_text(lengths=(12,) * 4, count=1)) > 1e-5


def test_full_attention_behind_closed_gates_cannot(make_model, make_text):
    """At the start of training the gates are shut, so nothing is carried yet."""
    model = make_model(1, **CONTROL)
    for block in model.conditioner.branches[0].refiner.blocks:
        block.gates.reset_parameters()
    assert loss_gap(model, make_text(lengths=(12,) * 4, count=1)) == 0.0


def test_the_transformer_gets_the_visible_tokens_of_every_encoder(make_model, make_text):
    model, text, t = (
        make_model(2, visible_tokens=VISIBLE),
        make_text(lengths=(12, 3, 8)),
        torch.rand(3),
    )
    seen = model.conditioner(text, t)
    assert seen.tokens.shape[1] == 2 * VISIBLE
    # the second LLM's captions are one longer
    assert seen.mask.sum(1).tolist() == [2 * VISIBLE, 3 + 4, 2 * VISIBLE]
    model.conditioner.visible_tokens = None
    whole = model.conditioner(text, t)
    first = [*range(VISIBLE), *range(12, 12 + VISIBLE)]
    # refined from all tokens
    torch.testing.assert_close(seen.tokens, whole.tokens[:, first], rtol=0, atol=0)


def test_the_setting_is_saved_with_the_model(make_model, tmp_path):
    make_model(1, visible_tokens=VISIBLE).save_pretrained(tmp_path)
    assert LIDiT.load(tmp_path).conditioner.visible_tokens == VISIBLE
