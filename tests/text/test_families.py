"""Models of unusual families give the untouched model's states, or are refused in one line: never
other states.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
)

from lidit.config import EncoderSettings
from lidit.errors import InputError
from lidit.text import PromptEncoder, resolve_encoder
from tests.helpers.tiny_models import LAYERS, tiny_tokenizer

Make = Callable[..., EncoderSettings]
CAPTIONS = [
    "a red circle",
    "x",
    "two yellow triangles left of a large white star, photographed in the evening light",
]
TOKENIZER = tiny_tokenizer("t5")
SIZES = {
    "vocab_size": len(TOKENIZER),
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 3,
}
HALVES = {
    "d_model": 32,
    "encoder_layers": LAYERS,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "decoder_start_token_id": 3,
}
T5_LIKE = {
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": LAYERS,
    "num_heads": 4,
    "decoder_start_token_id": 3,
}
GEMMA = {
    **SIZES,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "sliding_window": 16,
    "query_pre_attn_scalar": 8,
}


def make(folder: Path, family: str, auto: Any = AutoModel, **shape: Any) -> Path:
    """A random model of a family, saved as its users save it."""
    common = {key: value for key, value in SIZES.items() if key not in shape}
    if family == "xlnet":  # has no limit to its positions
        del common["max_position_embeddings"]
    config = AutoConfig.for_model(family, **common, **shape)
    torch.manual_seed(0)
    model = auto.from_config(config).float().eval()
    # the default initialisation is so small that nothing matters
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2:
            torch.nn.init.normal_(parameter, std=0.15)
        elif "norm" not in name.lower():
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return folder


def load(settings: EncoderSettings) -> PromptEncoder:
    return PromptEncoder.load(resolve_encoder(settings, "cpu"), "cpu")


def refusal(settings: EncoderSettings) -> str:
    with pytest.raises(InputError) as caught:
        load(settings)
    text = str(caught.value)
    assert "\n" not in text
    assert settings.name in text or settings.model in text
    return text


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert found.shape == expected.shape
    return float((found - expected).norm() / expected.norm())


# -- models that do not read what stands before a caption ------------------------------------------


@pytest.mark.parametrize(
    ("family", "shape"),
    [
        ("rwkv", {"attention_hidden_size": 32}),
        ("openai-gpt", {"n_embd": 32, "n_layer": LAYERS, "n_head": 4, "n_positions": 512}),
        (
            "xlstm",
            {"num_blocks": LAYERS, "num_heads": 4, "qk_dim_factor": 0.5, "v_dim_factor": 1.0},
        ),
    ],
)
def test_models_that_drop_the_prefix_are_refused(
    family: str, shape: dict[str, Any], tmp_path: Path, settings: Make
) -> None:
    make(tmp_path, family, **shape)
    text = refusal(settings(tmp_path, layer=-1))
    assert "without their instruction" in text or "cannot read a prefix ahead" in text


# -- encoder halves --------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [1, -2, -1])
@pytest.mark.parametrize(
    ("family", "shape"),
    [
        ("bart", HALVES),
        ("mbart", HALVES),
        ("pegasus", HALVES),
        ("marian", HALVES),
        ("m2m_100", HALVES),
        ("longt5", {**T5_LIKE, "num_decoder_layers": 2, "local_radius": 40}),
        ("t5gemma", {"encoder": GEMMA, "decoder": GEMMA}),
    ],
)
def test_of_two_halves_the_encoder_is_read(
    family: str, shape: dict[str, Any], layer: int, tmp_path: Path, settings: Make
) -> None:
    make(tmp_path, family, AutoModelForSeq2SeqLM, **shape)
    encoder = load(settings(tmp_path, kind="encoder", layer=layer, max_tokens=200))
    whole = AutoModelForSeq2SeqLM.from_pretrained(tmp_path).eval().get_encoder()
    for row in encoder.encode(CAPTIONS):
        with torch.no_grad():
            ids = torch.tensor([row.token_ids])
            output = whole(
                input_ids=ids, attention_mask=torch.ones_like(ids), output_hidden_states=True
            )
        assert relative(row.states, output.hidden_states[layer][0]) < 1e-5
    assert encoder.trunk.parameters <= sum(parameter.numel() for parameter in whole.parameters())


@pytest.mark.parametrize("layer", [-2, -1])
@pytest.mark.parametrize("family", ["bert", "roberta", "xlm-roberta"])
def test_a_checkpoint_without_the_unused_pooler_is_whole(
    family: str, layer: int, tmp_path: Path, settings: Make
) -> None:
    make(tmp_path, family, AutoModelForMaskedLM)
    whole = AutoModelForMaskedLM.from_pretrained(tmp_path).eval()
    for row in load(settings(tmp_path, kind="encoder", layer=layer)).encode(CAPTIONS):
        with torch.no_grad():
            output = whole(torch.tensor([row.token_ids]), output_hidden_states=True)
        assert relative(row.states, output.hidden_states[layer][0]) < 1e-5


def test_a_cache_of_another_window_than_the_models_is_refused(
    tmp_path: Path, settings: Make
) -> None:
    shape = {
        "sliding_window": 8,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
    }
    make(tmp_path, "qwen3_vl_moe_text", moe_intermediate_size=32, **shape)
    assert "read ahead" in refusal(settings(tmp_path, layer=-1))
    load(settings(tmp_path, layer=-1, template="{}")).encode(CAPTIONS)


# -- padding, layouts, convolutions ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "shape"),
    [
        ("fnet", {}),
        ("mobilebert", {"embedding_size": 32, "intra_bottleneck_size": 32, "true_hidden_size": 32}),
    ],
)
@pytest.mark.parametrize("layer", [-2, -1])
def test_models_that_mix_padding_into_captions_are_refused(
    family: str, shape: dict[str, Any], layer: int, tmp_path: Path, settings: Make
) -> None:
    make(tmp_path, family, AutoModelForMaskedLM, **shape)
    assert "padding changes" in refusal(settings(tmp_path, kind="encoder", layer=layer))


def test_deberta_with_a_convolution_behind_its_first_block(tmp_path: Path, settings: Make) -> None:
    make(
        tmp_path,
        "deberta-v2",
        conv_kernel_size=3,
        conv_act="gelu",
        relative_attention=True,
        pos_att_type="p2c|c2p",
    )
    assert "convolution" in refusal(settings(tmp_path, kind="encoder", layer=1))
    whole = AutoModel.from_pretrained(tmp_path).eval()
    for row in load(settings(tmp_path, kind="encoder", layer=2)).encode(CAPTIONS):
        with torch.no_grad():
            expected = whole(
                torch.tensor([row.token_ids]), output_hidden_states=True
            ).hidden_states[2][0]
        assert relative(row.states, expected) < 1e-5


def test_blocks_that_put_tokens_before_captions_are_refused(tmp_path: Path, settings: Make) -> None:
    make(tmp_path, "xlnet", d_model=32, n_layer=LAYERS, n_head=4, d_inner=64)
    assert "use layer: -1" in refusal(settings(tmp_path, kind="encoder", layer=-2))


@pytest.mark.parametrize("layer", [1, -2])
def test_blocks_that_give_a_dictionary_are_refused(
    layer: int, tmp_path: Path, settings: Make
) -> None:
    make(tmp_path, "squeezebert", embedding_size=32)
    assert "use layer: -1" in refusal(settings(tmp_path, kind="encoder", layer=layer))


@pytest.mark.parametrize("layer", [1, -2])
def test_a_model_that_counts_its_blocks_is_refused(
    layer: int, tmp_path: Path, settings: Make
) -> None:
    make(tmp_path, "xlm", emb_dim=32, n_layers=LAYERS, n_heads=4)
    assert "use layer: -1" in refusal(settings(tmp_path, kind="encoder", layer=layer))


# -- positions -------------------------------------------------------------------------------------


def test_learned_positions_that_do_not_reach(tmp_path: Path, settings: Make) -> None:
    make(
        tmp_path / "gpt2",
        "gpt2",
        AutoModelForCausalLM,
        n_embd=32,
        n_layer=LAYERS,
        n_head=4,
        max_position_embeddings=40,
    )
    bare = {"instruction": "a red circle", "layer": -2}
    text = refusal(settings(tmp_path / "gpt2", max_tokens=60, **bare))
    limit = int(text.rpartition("max_tokens to ")[2].split()[0])
    encoder = load(settings(tmp_path / "gpt2", max_tokens=limit, **bare))
    assert len(encoder.tokenizer.context_ids) + limit == 40
    assert max(len(row.token_ids) for row in encoder.encode([CAPTIONS[2] * 9])) == limit
    refusal(settings(tmp_path / "gpt2", max_tokens=limit + 1, **bare))

    # up to the padding's, none is used
    make(tmp_path / "roberta", "roberta", max_position_embeddings=34)
    assert "max_tokens to 30 or less" in refusal(
        settings(tmp_path / "roberta", kind="encoder", layer=-1)
    )
    load(settings(tmp_path / "roberta", kind="encoder", layer=-1, max_tokens=30)).encode(
        [CAPTIONS[2] * 9]
    )


# -- what a folder holds ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["consolidated.safetensors", "model.fp16.safetensors"])
def test_weights_under_another_name_are_refused_before_they_are_read(
    name: str, tmp_path: Path, settings: Make, model_of: Callable[[str], Path]
) -> None:
    for path in model_of("llama").iterdir():
        (tmp_path / (name if path.name == "model.safetensors" else path.name)).write_bytes(
            path.read_bytes()
        )
    with pytest.raises(InputError, match=rf"beside {name}; rename"):
        resolve_encoder(settings(tmp_path), "cpu")


def test_a_config_without_a_text_models_shape_is_refused(tmp_path: Path, settings: Make) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "encodec"}))
    with pytest.raises(InputError, match="does not say how many blocks"):
        resolve_encoder(settings(tmp_path, kind="encoder"), "cpu")
