"""What the model tests of diffusers ask, of our networks: saving, casting, offloading, and what is
refused.
"""

import json
from copy import deepcopy
from importlib.util import find_spec

import pytest
import torch
from diffusers import BitsAndBytesConfig, FirstBlockCacheConfig, TorchAoConfig
from torch import nn

from lidit.errors import InputError
from lidit.models import LIDiT, TextStates


def outputs(model: LIDiT, text: dict[str, TextStates]) -> torch.Tensor:
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        return model(torch.randn(3, 3, 8, 8, generator=noise), torch.tensor([0.1, 0.5, 0.9]), text)


@pytest.mark.parametrize("kind", ["block_level", "leaf_level"])
def test_group_offloading_changes_no_bit(make_model, make_text, kind) -> None:
    model, text = make_model(), make_text()
    expected = outputs(model, text)
    blocks = {"num_blocks_per_group": 1} if kind == "block_level" else {}
    model.enable_group_offload(
        torch.device("cpu"), torch.device("cpu"), offload_type=kind, **blocks
    )
    assert any(hasattr(module, "_diffusers_hook") for module in model.modules())
    torch.testing.assert_close(outputs(model, text), expected, rtol=0, atol=0)


def test_layerwise_casting_stores_eight_bits_and_computes_as_rounded_weights(
    make_model, make_text
) -> None:
    model, text = make_model(), make_text()
    rounded = deepcopy(model)
    model.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    small = [name for name, each in model.named_parameters() if each.dtype == torch.float8_e4m3fn]
    assert any(".blocks.1." in name for name in small)
    assert any(name.startswith("conditioner.") for name in small)
    with torch.no_grad():
        for name in small:
            parameter = rounded.get_parameter(name)
            parameter.copy_(parameter.to(torch.float8_e4m3fn))
    expected = outputs(rounded, text)
    torch.testing.assert_close(outputs(model, text), expected, rtol=0, atol=0)
    assert model.get_parameter(small[0]).dtype == torch.float8_e4m3fn


def test_checkpointing_can_be_switched_on_and_off(make_model, make_text) -> None:
    model, text = make_model().train(), make_text()

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        x = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(2))
        model(x, torch.tensor([0.1, 0.5, 0.9]), text).square().mean().backward()
        return [
            parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None
        ]

    expected = gradients()
    model.enable_gradient_checkpointing()
    assert model.is_gradient_checkpointing
    torch.testing.assert_close(gradients(), expected)
    model.disable_gradient_checkpointing()
    assert not model.is_gradient_checkpointing
    torch.testing.assert_close(gradients(), expected, rtol=0, atol=0)


def test_switches_that_would_change_nothing_are_refused(make_model) -> None:
    model = make_model()
    for part in (model, model.transformer):
        part.set_attention_backend("native")
        with pytest.raises(InputError, match="sdpa_kernel"):
            part.set_attention_backend("flash")
        with pytest.raises(InputError, match="scaled_dot_product_attention"):
            part.enable_xformers_memory_efficient_attention()
        with pytest.raises(InputError, match="FirstBlockCacheConfig: the caches"):
            part.enable_cache(FirstBlockCacheConfig(threshold=0.1))


def test_a_quantization_that_cannot_be_had_says_which_package_it_wants(
    make_model, tmp_path
) -> None:
    make_model().save_pretrained(tmp_path)
    with pytest.raises((ImportError, RuntimeError), match=r"bitsandbytes|GPU"):
        LIDiT.from_pretrained(tmp_path, quantization_config=BitsAndBytesConfig(load_in_8bit=True))
    assert isinstance(LIDiT.from_pretrained(tmp_path).transformer.final_linear, nn.Linear)
    # A folder that was saved quantized, on a machine without the package.
    config = tmp_path / "config.json"
    eight_bits = {"_type": "Int8WeightOnlyConfig", "_version": 2, "_data": {}}
    saved = {"quant_method": "torchao", "quant_type": {"default": eight_bits}}
    config.write_text(json.dumps(json.loads(config.read_text()) | {"quantization_config": saved}))
    if find_spec("torchao") is None:
        with pytest.raises((ImportError, NotImplementedError), match="torchao"):
            LIDiT.from_pretrained(tmp_path)


def test_torchao_stores_linear_layers_in_eight_bits(make_model, make_text, tmp_path) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    model, text = make_model(), make_text()
    model.save_pretrained(tmp_path / "whole")
    config = TorchAoConfig(quantization.Int8WeightOnlyConfig())
    small = LIDiT.from_pretrained(
        tmp_path / "whole", quantization_config=config, torch_dtype=torch.float32
    )
    layers = [each for each in small.modules() if isinstance(each, nn.Linear)]
    assert {type(each.weight).__name__ for each in layers} == {"Int8Tensor"}
    expected, found = outputs(model, text), outputs(small, text)
    assert 0 < (found - expected).norm() < 0.1 * expected.norm()
    small.save_pretrained(tmp_path / "small")
    again = LIDiT.from_pretrained(tmp_path / "small", torch_dtype=torch.float32)
    torch.testing.assert_close(outputs(again, text), found, rtol=0, atol=0)
