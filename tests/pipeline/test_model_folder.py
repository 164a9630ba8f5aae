"""The folder that a trained model is saved to and loaded from."""

import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file

from lidit.config import PAPER_INSTRUCTION, CodecSettings, SamplerChanges
from lidit.errors import InputError
from lidit.models import LIDiT
from lidit.pipeline import LIDiTPipeline
from lidit.pipeline.checksums import CHECKSUMS
from lidit.text import resolve_encoder
from tests.helpers.prompts import PROMPTS


def test_a_changed_sampler_is_used_from_then_on_and_not_saved(saved, pipe, tmp_path):
    expected = pipe(
        PROMPTS[0], num_inference_steps=2, guidance_scale=1, seed=1, output_type="np"
    ).images
    pipe.change_sampler(SamplerChanges(steps=2, guidance_scale=1))
    np.testing.assert_array_equal(pipe(PROMPTS[0], seed=1, output_type="np").images, expected)
    pipe.save_pretrained(tmp_path)
    assert LIDiTPipeline.from_pretrained(tmp_path).sampler.steps == 3
    with pytest.raises(InputError, match="sampling"):
        pipe.change_sampler(SamplerChanges.model_construct(steps=0))


def test_an_llm_found_elsewhere_is_taken_if_it_is_the_same(saved, llms, tmp_path):
    moved = shutil.copytree(llms[0].model, tmp_path / "moved")
    pipe = LIDiTPipeline.from_pretrained(saved, encoders={"llama": str(moved)})
    assert pipe.encoders["llama"].encoder().spec.folder == str(moved)
    assert (
        LIDiTPipeline.from_pretrained(saved, encoders={"llama": moved}).encoders["llama"].encoder()
    )
    hub = LIDiTPipeline.from_pretrained(
        saved, encoders={"llama": f"someone/llama@{'a' * 40}"}
    ).encoders["llama"]
    assert (hub.settings.model, hub.settings.revision) == ("someone/llama", "a" * 40)
    other = LIDiTPipeline.from_pretrained(saved, encoders={"llama": llms[1].model})
    with pytest.raises(
        InputError,
        match=r"encoder 'llama': .* is not what the model was trained " r"with.*weights_sha256",
    ):
        other(PROMPTS[0])


def test_folder_is_safetensors_json_and_the_loader_of_diffusers(saved):
    files = {str(path.relative_to(saved)) for path in saved.rglob("*") if path.is_file()}
    assert files == {
        "README.md",
        "checksums.json",
        "encoders/llama.json",
        "encoders/llama.safetensors",
        "encoders/qwen.json",
        "encoders/qwen.safetensors",
        "model/config.json",
        "model/diffusion_pytorch_model.safetensors",
        "model_index.json",
        "pipeline.py",
    }
    index = json.loads((saved / "model_index.json").read_text())
    assert index["_class_name"] == "LIDiTPipeline"
    assert index["objective"]["kind"] == "clean"
    assert index["codec"]["name"] == "pixels"
    assert (index["height"], index["width"]) == (16, 24)


def test_saved_whole_over_shards_it_can_be_loaded(pipe, tmp_path):
    for shard in ("20KB", "5GB", "20KB"):
        pipe.save_pretrained(tmp_path, max_shard_size=shard)
        loaded = LIDiTPipeline.from_pretrained(tmp_path)
        for name, value in pipe.model.state_dict().items():
            assert torch.equal(loaded.model.state_dict()[name], value), name


def test_saved_again_it_is_the_same_pipeline(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "again")
    again = LIDiTPipeline.from_pretrained(tmp_path / "again")
    np.testing.assert_array_equal(
        again(PROMPTS, seed=0, output_type="np").images,
        pipe(PROMPTS, seed=0, output_type="np").images,
    )


def test_the_card_names_encoders_data_and_scores(saved, llms):
    card = (saved / "README.md").read_text()
    for text in (
        PAPER_INSTRUCTION,
        "0123abcd",
        "| single | 0.75 |",
        "`clean`",
        resolve_encoder(llms[0]).fingerprint[:12],
    ):
        assert text in card


def test_a_template_that_renders_otherwise_is_told_at_the_first_prompt(saved, tmp_path):
    """As another release of transformers would: the spec is the same, the instruction is not."""
    copy = shutil.copytree(saved, tmp_path / "copy")
    path = copy / "encoders" / "qwen.json"
    facts = json.loads(path.read_text())
    facts["prefix_ids"][-1] += 1
    path.write_text(json.dumps(facts))
    (copy / "checksums.json").unlink()
    pipe = LIDiTPipeline.from_pretrained(copy)
    with pytest.raises(InputError, match="'qwen': the model was trained behind an instruction"):
        pipe(PROMPTS[:1])
    for name in ("prefix_ids", "empty_ids"):  # as an earlier release wrote it
        del facts[name]
    path.write_text(json.dumps(facts))
    assert len(LIDiTPipeline.from_pretrained(copy)(PROMPTS[:1]).images) == 1


def test_bfloat16_weights_keep_exact_statistics(saved, pipe):
    half = LIDiTPipeline.from_pretrained(saved, dtype=torch.bfloat16)
    assert half.model.transformer.final_linear.weight.dtype == torch.bfloat16
    for name in ("llama", "qwen"):
        exact = pipe.model.conditioner.branch(name).projection.mean
        torch.testing.assert_close(
            half.model.conditioner.branch(name).projection.mean, exact, rtol=0, atol=0
        )
    difference = (
        half(PROMPTS, seed=0, output_type="pt").images
        - pipe(PROMPTS, seed=0, output_type="pt").images
    )
    assert difference.abs().mean() < 0.02
    back = half.model.double().float().conditioner.branch("llama").projection
    assert back.mean.dtype == back.deviation.dtype == torch.float32, (
        "double precision must not stay for ever"
    )


def test_an_autoencoder_travels_with_the_model(pipe, tmp_path):
    """Copied into the folder, so that nobody needs the path or hub id it was trained with."""
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=3, norm_num_groups=4, scaling_factor=0.7, layers_per_block=1,
        sample_size=16,
    ).eval()  # fmt: skip
    vae.save_pretrained(tmp_path / "elsewhere")
    pipe.codec_settings = CodecSettings(name="small", model=str(tmp_path / "elsewhere"))
    pipe.save_pretrained(tmp_path / "model")
    shutil.rmtree(tmp_path / "elsewhere")
    (tmp_path / "model").rename(tmp_path / "moved")
    loaded = LIDiTPipeline.from_pretrained(tmp_path / "moved")
    latents = loaded(PROMPTS, seed=0, output_type="latent").images
    assert latents.shape == (3, 3, 8, 12)
    images = loaded(PROMPTS, seed=0, output_type="pt").images
    with torch.no_grad():
        expected = vae.decode(latents / 0.7).sample / 2 + 0.5
    torch.testing.assert_close(images, expected.clamp(0, 1), rtol=1e-4, atol=1e-5)
    with pytest.raises(InputError, match="multiples of 8"):
        loaded(PROMPTS[0], height=20, width=16)


def refused(saved, tmp_path, change):
    copy = shutil.copytree(saved, tmp_path / "copy")
    # as for a folder of the first release, or one that its owner changed
    (copy / CHECKSUMS).unlink()
    change(copy)
    with pytest.raises(InputError) as found:
        LIDiTPipeline.from_pretrained(copy)
    return str(found.value)


def test_what_is_missing_or_altered_is_named(saved, pipe, tmp_path):
    def edit_spec(folder):
        path = folder / "encoders" / "qwen.json"
        facts = json.loads(path.read_text())
        facts["spec"]["instruction"] = "something else"
        path.write_text(json.dumps(facts))

    def edit_sampler(folder):
        path = folder / "model_index.json"
        facts = json.loads(path.read_text())
        facts["sampler"]["stepz"] = 3
        path.write_text(json.dumps(facts))

    def widen(folder):
        path = folder / "model" / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"width": 64}))

    cases = [
        (
            lambda folder: (folder / "encoders/qwen.json").unlink(),
            "encoder 'qwen', but qwen.json is missing",
        ),
        (
            lambda folder: (folder / "encoders/qwen.safetensors").write_bytes(b"cut"),
            "encoder 'qwen' cannot be read",
        ),
        (edit_spec, "the fingerprint does not belong to the spec"),
        (edit_sampler, "model_index.json: sampler: stepz: unknown key; did you mean 'steps'"),
        (lambda folder: (folder / "model_index.json").unlink(), "not a model folder"),
        (widen, "the model cannot be loaded"),
    ]
    for number, (change, message) in enumerate(cases):
        assert message in refused(saved, tmp_path / str(number), change)
    with pytest.raises(InputError, match="no such model folder"):
        LIDiTPipeline.from_pretrained(tmp_path / "nothing")


def test_a_folder_with_only_a_pickle_is_refused(saved, tmp_path):
    """A harmless one that torch would load: another could run code. Both ways to our weights are
    tried.
    """

    def pickled(folder):
        weights = folder / "model" / "diffusion_pytorch_model.safetensors"
        torch.save(load_file(weights), weights.with_suffix(".bin"))
        weights.unlink()

    assert "no file named diffusion_pytorch_model.safetensors" in refused(saved, tmp_path, pickled)
    with pytest.raises(InputError, match=r"no file named diffusion_pytorch_model\.safetensors"):
        LIDiT.load(tmp_path / "copy" / "model")
    with pytest.raises(InputError, match="no such folder"):
        LIDiT.load(tmp_path / "absent")


def test_an_autoencoder_decodes_in_slices_and_tiles(pipe, tmp_path):
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=3, norm_num_groups=4,
        layers_per_block=1,
        sample_size=16,
    )  # fmt: skip
    vae.save_pretrained(tmp_path)
    pipe.codec_settings = CodecSettings(name="small", model=str(tmp_path))
    whole = pipe(PROMPTS, seed=0, output_type="pt").images
    assert isinstance(pipe.vae, AutoencoderKL)
    pipe.enable_vae_slicing()
    torch.testing.assert_close(
        pipe(PROMPTS, seed=0, output_type="pt").images, whole, rtol=1e-4, atol=1e-4
    )
    assert pipe.vae.use_slicing
    pipe.enable_vae_tiling()
    tiled = pipe(PROMPTS[0], height=64, width=64, seed=0, output_type="pt").images
    pipe.disable_vae_tiling()
    pipe.disable_vae_slicing()
    assert not pipe.vae.use_slicing
    assert (
        tiled - pipe(PROMPTS[0], height=64, width=64, seed=0, output_type="pt").images
    ).abs().max() > 1e-4
