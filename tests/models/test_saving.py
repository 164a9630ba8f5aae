"""A saved model is the same model: whole, in shards, and at another dtype."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from lidit.config import ModelSettings, RefinerSettings
from lidit.errors import InputError
from lidit.models import LIDiT, LIDiTTransformer, PromptConditioner


@pytest.mark.parametrize("shard", ["5GB", "40KB"])
def test_round_trip_is_bit_exact(make_model, make_text, tmp_path, shard):
    model = make_model(3)
    model.save_pretrained(tmp_path, max_shard_size=shard)
    files = sorted(path.name for path in tmp_path.iterdir())
    assert (len([name for name in files if name.endswith(".safetensors")]) > 1) == (shard != "5GB")
    assert not [name for name in files if name.endswith((".bin", ".pt", ".pkl"))]
    loaded = LIDiT.from_pretrained(tmp_path)
    assert {**loaded.config, "_name_or_path": None} == {**model.config, "_name_or_path": None}
    expected, found = model.state_dict(), loaded.state_dict()
    assert expected.keys() == found.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=0)
    text, x, t = make_text(count=3), torch.randn(3, 3, 8, 8), torch.rand(3)
    torch.testing.assert_close(loaded(x, t, text), model(x, t, text), rtol=0, atol=0)


def test_weights_and_configuration_that_do_not_belong_together_are_refused(make_model, tmp_path):
    """diffusers would fill what is missing with anything, the mean and deviation of an LLM's states
    included.
    """
    make_model().save_pretrained(tmp_path)
    weights, config = tmp_path / "diffusion_pytorch_model.safetensors", tmp_path / "config.json"
    whole, settings = load_file(weights), json.loads(config.read_text())
    for name in ("conditioner.branches.0.projection.mean", "transformer.final_linear.weight"):
        save_file({key: value for key, value in whole.items() if key != name}, weights)
        with pytest.raises(InputError, match=f"do not belong together .missing: {name}"):
            LIDiT.load(tmp_path)
    save_file({**whole, "transformer.more": torch.zeros(1)}, weights)
    with pytest.raises(InputError, match=r"unexpected: transformer\.more"):
        LIDiT.load(tmp_path)
    save_file(whole, weights)
    assert (
        LIDiT.load(tmp_path, torch.bfloat16).transformer.final_linear.weight.dtype == torch.bfloat16
    )
    for change, message in (
        ({"depth": 3}, "missing: "),
        ({"width": 64}, "cannot be loaded|mismatched"),
    ):
        config.write_text(json.dumps(settings | change))
        with pytest.raises(InputError, match=message):
            LIDiT.load(tmp_path)


def test_parts_round_trip_alone(make_model, make_text, tmp_path):
    model = make_model()
    model.conditioner.save_pretrained(tmp_path / "conditioner")
    model.transformer.save_pretrained(tmp_path / "transformer")
    conditioner = PromptConditioner.from_pretrained(tmp_path / "conditioner")
    transformer = LIDiTTransformer.from_pretrained(tmp_path / "transformer")
    text, x, t = make_text(), torch.randn(3, 3, 8, 8), torch.rand(3)
    torch.testing.assert_close(
        transformer(x, t, conditioner(text, t)), model(x, t, text), rtol=0, atol=0
    )


def test_statistics_load_at_float32_into_a_bfloat16_model(make_model, tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path)
    loaded = LIDiT.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    projection = loaded.conditioner.branches[0].projection
    assert projection.linear.weight.dtype == torch.bfloat16
    torch.testing.assert_close(
        projection.mean, model.conditioner.branches[0].projection.mean, rtol=0, atol=0
    )


def test_the_order_of_the_encoders_does_not_matter(tmp_path):
    """A configuration file sorts its keys; branches must not be swapped by that."""
    widths = {"zeta": 12, "alpha": 20}
    settings = ModelSettings(
        width=32, depth=1, heads=4, patch_size=2, refiner=RefinerSettings(depth=1)
    )
    model = LIDiT.from_settings(settings, widths, 3)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["encoders"] == widths
    loaded = LIDiT.from_pretrained(tmp_path)
    for name, width in widths.items():
        assert loaded.conditioner.branch(name).projection.linear.in_features == width
        torch.testing.assert_close(
            loaded.conditioner.branch(name).projection.linear.weight,
            model.conditioner.branch(name).projection.linear.weight,
        )
