"""Models whose blocks are not all alike are cut where they are asked to be, or refused in one line:
never other states.

Gemma 4 has all of it: its config names the blocks that are wider, forces the last one's kind,
counts the blocks that share keys from the end, and packs a table for every block into one tensor.
"""

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3nTextConfig,
    Gemma4TextConfig,
    Lfm2Config,
    PreTrainedConfig,
    PreTrainedModel,
)

from lidit.config import EncoderSettings
from lidit.errors import InputError
from lidit.text import PromptEncoder, resolve_encoder
from tests.helpers.tiny_models import LAYERS, WINDOW, tiny_tokenizer

Make = Callable[..., EncoderSettings]
CAPTION = "a red circle and a blue square, photographed in the evening light"
TOKENIZER = tiny_tokenizer("gemma3")
SHAPE = {
    "vocab_size": len(TOKENIZER),
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 3,
}
MIXED = {
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention"] * (LAYERS // 2),
}
PER_LAYER = {
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": len(TOKENIZER),
    "num_kv_shared_layers": 2,
}
GEMMA4 = {
    "wider heads": {"global_head_dim": 32, "hidden_size_per_layer_input": 0},
    "equal heads": {"global_head_dim": 16, "hidden_size_per_layer_input": 0},
    "per layer inputs and shared keys": {"global_head_dim": 32, **PER_LAYER},
}


def save(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            torch.nn.init.normal_(parameter, std=0.15)
    model.eval().save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return model


def build(config: PreTrainedConfig, folder: Path) -> PreTrainedModel:
    return save(AutoModelForCausalLM.from_config(config).float(), folder)


@pytest.fixture(scope="module")
def gemma4(
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str], tuple[Path, PreTrainedModel]]:
    made: dict[str, tuple[Path, PreTrainedModel]] = {}

    def model(kind: str) -> tuple[Path, PreTrainedModel]:
        if kind not in made:
            folder = tmp_path_factory.mktemp("gemma4")
            made[kind] = (
                folder,
                build(Gemma4TextConfig(**SHAPE, **MIXED, head_dim=16, **GEMMA4[kind]), folder),
            )
        return made[kind]

    return model


@pytest.mark.parametrize("layer", [1, 2, 3, -3, -2, -1])
@pytest.mark.parametrize("kind", GEMMA4)
def test_a_cut_model_gives_the_whole_ones_states(
    kind: str, layer: int, gemma4: Callable[[str], tuple[Path, PreTrainedModel]], settings: Make
) -> None:
    folder, model = gemma4(kind)
    encoder = PromptEncoder.load(resolve_encoder(settings(folder, layer=layer), "cpu"), "cpu")
    context = encoder.tokenizer.context_ids
    assert len(context) > WINDOW
    (found,) = encoder.encode([CAPTION])
    with torch.no_grad():
        ids = torch.tensor([[*context, *found.token_ids]])
        expected = model(ids, output_hidden_states=True).hidden_states[layer][0, len(context) :]
    assert (found.states - expected).norm() / expected.norm() < 2e-5


def test_what_stands_behind_the_layer_is_not_loaded(
    gemma4: Callable[[str], tuple[Path, PreTrainedModel]],
    settings: Make,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder, model = gemma4("equal heads")
    with caplog.at_level(logging.WARNING):
        encoder = PromptEncoder.load(resolve_encoder(settings(folder, layer=-2), "cpu"), "cpu")
    per_block = sum(p.numel() for p in model.model.layers[-1].parameters())
    assert encoder.trunk.parameters == sum(p.numel() for p in model.model.parameters()) - per_block
    assert not caplog.records


def test_of_blocks_with_several_streams_only_the_last_states_are_had(
    tmp_path: Path, settings: Make
) -> None:
    shape = {**SHAPE, "intermediate_size": [128] * LAYERS}
    model = build(Gemma3nTextConfig(**shape, **MIXED, **PER_LAYER), tmp_path)
    encoder = PromptEncoder.load(resolve_encoder(settings(tmp_path, layer=-1), "cpu"), "cpu")
    context = encoder.tokenizer.context_ids
    (found,) = encoder.encode([CAPTION])
    with torch.no_grad():
        expected = model.model(torch.tensor([[*context, *found.token_ids]])).last_hidden_state[
            0, len(context) :
        ]
    assert (found.states - expected).norm() / expected.norm() < 2e-5
    with pytest.raises(
        InputError, match=r"gemma3n_text: a block of this model gives .* use layer: " r"-1"
    ):
        PromptEncoder.load(resolve_encoder(settings(tmp_path, layer=2), "cpu"), "cpu")


def test_blocks_that_keep_more_than_keys_are_refused(tmp_path: Path, settings: Make) -> None:
    build(Lfm2Config(**SHAPE, layer_types=["full_attention", "conv"] * (LAYERS // 2)), tmp_path)
    for layer in (2, -1):
        with pytest.raises(InputError, match="more of a prefix than keys and values"):
            PromptEncoder.load(resolve_encoder(settings(tmp_path, layer=layer), "cpu"), "cpu")
    assert PromptEncoder.load(resolve_encoder(settings(tmp_path, layer=1), "cpu"), "cpu").encode(
        [CAPTION]
    )
