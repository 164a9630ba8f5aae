"""LoRA adapters of a pipeline: they load, scale, unload and merge, and what fits nothing is
refused.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lidit.config.align import LoraSettings
from lidit.errors import InputError
from lidit.models.lora import add_lora, merge_lora
from lidit.pipeline import LIDiTPipeline
from lidit.pipeline.adapters import LORA_FILE
from tests.helpers.random_pipeline import random_pipeline, random_states


def drawn(pipe: LIDiTPipeline) -> torch.Tensor:
    states = {
        name: entry.collate([random_states(3, 1)[name]]) for name, entry in pipe.encoders.items()
    }
    return torch.as_tensor(np.asarray(pipe(states=states, seed=0, output_type="latent").images))


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an adapter that changes pictures."""
    pipe = random_pipeline("clean")
    add_lora(pipe.model, LoraSettings(rank=2))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in pipe.model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    folder: Path = tmp_path_factory.mktemp("adapter")
    assert pipe.save_lora_weights(folder) == folder / LORA_FILE
    return folder


def test_a_new_adapter_changes_nothing_and_is_all_that_is_trained() -> None:
    pipe = random_pipeline("clean")
    before = drawn(pipe)
    add_lora(pipe.model, LoraSettings(rank=2))
    assert torch.equal(drawn(pipe), before)
    trained = {name for name, parameter in pipe.model.named_parameters() if parameter.requires_grad}
    assert trained
    assert all(".lora_" in name for name in trained)


def test_an_adapter_loads_scales_and_unloads(adapter: Path) -> None:
    pipe = random_pipeline("clean")
    before = drawn(pipe)
    pipe.load_lora_weights(adapter, adapter_name="style")
    full = drawn(pipe)
    assert (full - before).abs().max() > 0.01
    pipe.set_adapters(["style"], [0.5])
    half = drawn(pipe)
    assert not torch.equal(half, full)
    assert not torch.equal(half, before)
    pipe.set_adapters(["style"], [0.0])
    assert torch.equal(drawn(pipe), before)
    pipe.unload_lora_weights()
    assert torch.equal(drawn(pipe), before)
    assert pipe.get_list_adapters() == {}


def test_a_merged_adapter_draws_as_an_unmerged_one(adapter: Path, tmp_path: Path) -> None:
    pipe = random_pipeline("clean")
    pipe.load_lora_weights(adapter)
    unmerged = drawn(pipe)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    torch.testing.assert_close(drawn(pipe), unmerged, rtol=0, atol=1e-5)
    pipe.save_pretrained(tmp_path)  # an ordinary model folder again
    weights = load_file(tmp_path / "model" / "diffusion_pytorch_model.safetensors")
    assert weights.keys() == random_pipeline("clean").model.state_dict().keys()


def test_a_trained_adapter_merges_into_an_ordinary_network(adapter: Path) -> None:
    pipe = random_pipeline("clean")
    pipe.load_lora_weights(adapter)
    unmerged = drawn(pipe)
    merge_lora(pipe.model)
    assert pipe.model.state_dict().keys() == random_pipeline("clean").model.state_dict().keys()
    assert all(parameter.requires_grad for parameter in pipe.model.parameters())
    torch.testing.assert_close(drawn(pipe), unmerged, rtol=0, atol=1e-5)


def test_what_is_no_adapter_of_this_network_is_refused(adapter: Path, tmp_path: Path) -> None:
    pipe = random_pipeline("clean")
    before = drawn(pipe)
    tensors = load_file(adapter / LORA_FILE)
    renamed = {f"model.other.{key.removeprefix('model.')}": value for key, value in tensors.items()}
    wide = {
        key: torch.cat([value, value], dim=-1) if "lora_A" in key else value
        for key, value in tensors.items()
    }
    for content in (renamed, {"weight": torch.zeros(1)}, {}, wide):
        with pytest.raises(InputError, match="no adapter"):
            pipe.load_lora_weights(content)
    save_file(renamed, tmp_path / "renamed.safetensors")
    with pytest.raises(InputError, match=r"renamed.safetensors: no adapter of this network"):
        pipe.load_lora_weights(tmp_path / "renamed.safetensors")
    for name, message in (
        ("absent.safetensors", "no such adapter"),
        ("pickle.bin", "can run code"),
    ):
        with pytest.raises(InputError, match=message):
            pipe.load_lora_weights(tmp_path / name)
    (tmp_path / "torn.safetensors").write_bytes((adapter / LORA_FILE).read_bytes()[:50])
    with pytest.raises(InputError, match="cannot be read"):
        pipe.load_lora_weights(tmp_path / "torn.safetensors")
    assert torch.equal(drawn(pipe), before)
    pipe.require_no_adapters()


def test_a_name_twice_and_a_save_with_adapters_are_refused(adapter: Path, tmp_path: Path) -> None:
    pipe = random_pipeline("clean")
    with pytest.raises(InputError, match=r"none of the adapters \(none\)"):
        pipe.save_lora_weights(tmp_path)
    pipe.load_lora_weights(adapter, adapter_name="style")
    with pytest.raises(InputError, match="'style' is taken"):
        pipe.load_lora_weights(adapter, adapter_name="style")
    with pytest.raises(InputError, match=r"style are loaded: call fuse_lora"):
        pipe.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"lora.targets: 'nothing'"):
        add_lora(random_pipeline("clean").model, LoraSettings(targets="nothing"))
