"""Which layers of one pass, joined how, against the whole model; and what names a family."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel

from lidit.text import resolve_encoder
from lidit.text.rules import ONE_BLOCK, PLAIN_TEXT, set_fields
from tests.helpers.tiny_models import LAYERS
from tests.helpers.whole_model import CAPTIONS, Make, close, load, whole


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("join", ["concatenate", "interleave", "separate"])
def test_several_layers_of_one_pass(
    family: str, join: str, model_of: Callable[[str], Path], settings: Make
) -> None:
    encoder = load(settings(model_of(family), layers=[0, 2, -3], join=join))
    assert encoder.spec.blocks == LAYERS - 2
    assert len(encoder.trunk.model.layers) == LAYERS - 2
    context = encoder.tokenizer.context_ids
    for found in encoder.encode(CAPTIONS):
        states = whole(model_of(family), [*context, *found.token_ids])
        three = [states[layer][len(context) :] for layer in (0, 2, LAYERS - 2)]
        expected = (
            torch.stack(three, dim=-1).flatten(-2)
            if join == "interleave"
            else torch.cat(three, dim=-1)
        )
        assert close(found.states, expected)
    ids, prefix = encoder.prefix_states()
    assert (
        prefix.shape == (len(ids), encoder.spec.width) == (len(ids), 3 * encoder.spec.model_width)
    )


def test_layers_normalised_and_averaged(model_of: Callable[[str], Path], settings: Make) -> None:
    encoder = load(settings(model_of("llama"), layers="all", join="mean", normalise="standard"))
    context = encoder.tokenizer.context_ids
    found = encoder.encode(CAPTIONS[:1])[0]
    states = torch.stack(whole(model_of("llama"), [*context, *found.token_ids])[1:])[
        :, len(context) :
    ]
    normal = (states - states.mean(-1, keepdim=True)) / states.std(-1, keepdim=True)
    assert close(found.states, normal.mean(0))
    assert encoder.spec.width == encoder.spec.model_width


@pytest.mark.parametrize("final_norm", [True, False])
def test_the_last_block_with_and_without_the_final_norm(
    final_norm: bool, model_of: Callable[[str], Path], settings: Make
) -> None:
    encoder = load(settings(model_of("llama"), layer=-1, final_norm=final_norm))
    found = encoder.encode(CAPTIONS[:1])[0]
    context = encoder.tokenizer.context_ids
    model = AutoModel.from_pretrained(model_of("llama")).eval()
    raw: list[torch.Tensor] = []
    model.layers[-1].register_forward_hook(lambda _module, _inputs, output: raw.append(output))
    with torch.no_grad():
        last = model(torch.tensor([[*context, *found.token_ids]])).last_hidden_state
    assert close(found.states, (last if final_norm else raw[0])[0, len(context) :])


def test_one_layer_has_one_name(model_of: Callable[[str], Path], settings: Make) -> None:
    one = resolve_encoder(settings(model_of("llama")), "cpu")
    assert (
        resolve_encoder(settings(model_of("llama"), layers=[-3]), "cpu").fingerprint
        == one.fingerprint
    )
    assert set_fields(ONE_BLOCK) == set_fields(PLAIN_TEXT) == {}
    assert not {"layers", "join", "text", "reading", "suffix", "padding"} & set(one.to_dict())


@pytest.mark.parametrize(
    "changes",
    [
        {"layers": [1, -3]},
        {"layers": [1, -3], "join": "interleave"},
        {"layers": [1, -3], "normalise": "rms"},
        {"layer": -1, "final_norm": False},
        {"chat_template": True, "suffix": "kept"},
        {"template": "{}"},
        {"template": "{}", "clean": ["strip"]},
        {"template": "{}", "empty": 7},
        {"template": "{}", "padding": {"masked": True}},
        {"template": "{}", "padding": {"token": 9}},
        {"template": "{}", "padding": {"masked": True, "position": 1}},
        {"template": "{}", "counted": "whole"},
    ],
)
def test_whatever_changes_states_changes_the_fingerprint(
    changes: dict[str, Any], model_of: Callable[[str], Path], settings: Make
) -> None:
    folder = model_of("llama")
    fingerprints = {
        resolve_encoder(settings(folder, **some), "cpu").fingerprint for some in ({}, changes)
    }
    base = (
        {"template": "{}"}
        if changes.get("template")
        else {"layer": -1}
        if "final_norm" in changes
        else {}
    )
    if base != changes:
        fingerprints.add(resolve_encoder(settings(folder, **base), "cpu").fingerprint)
    assert len(fingerprints) == (2 if base in ({}, changes) else 3)
