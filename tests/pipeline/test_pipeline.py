"""From a trained model's folder to images, with small random LLMs and a real corpus behind it."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file

from lidit.config import (
    PAPER_INSTRUCTION,
    CodecSettings,
    EncoderSettings,
    ModelSettings,
    ObjectiveSettings,
    SamplerChanges,
    SamplerSettings,
)
from lidit.errors import InputError
from lidit.models import LIDiT, TextStates
from lidit.pipeline import LIDiTPipeline, PipelineSettings, save_pipeline
from lidit.pipeline.checksums import CHECKSUMS
from lidit.pipeline.model_encoder import ModelEncoder
from lidit.store import channel_statistics
from lidit.text import PromptEncoder, resolve_encoder
from tests.helpers.tiny_models import tiny_llm

PROMPTS = ["a red cube on a blue sphere", "a circle", "a green square left of the red circle and a cube"]


@pytest.fixture(scope="module")
def llms(tmp_path_factory):
    """Two random language models of other families, widths and storage dtypes."""
    root = tmp_path_factory.mktemp("llms")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LIDIT_CACHE", str(root / "cache"))  # remembers file digests of models that live for one test
        yield [
            EncoderSettings(name=name, model=str(tiny_llm(root / name, family, 4, width)), storage=storage)
            for name, family, width, storage in (("llama", "llama", 32, "bfloat16"), ("qwen", "qwen2", 48, "int8"))
        ]


def trained_on(settings):
    """What training holds of one LLM, computed from the LLM itself."""
    spec = resolve_encoder(settings)
    encoder = PromptEncoder.load(spec)
    states = [caption.states for caption in encoder.encode(PROMPTS)]
    mean, deviation = channel_statistics(states)
    fixed = settings.model_copy(update={"dtype": spec.dtype, "storage": spec.storage})
    return ModelEncoder(
        fixed, spec.to_dict(), spec.fingerprint, encoder.prefix_states()[1], encoder.empty_states()[1], mean, deviation
    )


@pytest.fixture(scope="module")
def saved(llms, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "folder"
    torch.manual_seed(0)
    encoders = [trained_on(settings) for settings in llms]
    shape = ModelSettings.model_validate({"width": 32, "depth": 2, "heads": 4, "patch_size": 4})
    model = LIDiT.from_settings(shape, {e.name: e.mean.shape[0] for e in encoders}, 3).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    for encoder in encoders:
        model.conditioner.set_statistics(encoder.name, encoder.mean, encoder.deviation)
    save_pipeline(
        folder,
        model,
        encoders,
        PipelineSettings(
            ObjectiveSettings(kind="clean"),
            SamplerSettings(steps=3, guidance_scale=2.0),
            CodecSettings(),
            height=16,
            width=24,
        ),
        {"corpus": "0123abcd", "scores": {"single": 0.75}},
    )
    return folder


@pytest.fixture
def pipe(saved):
    pipeline = LIDiTPipeline.from_pretrained(saved)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_prompt_to_image(pipe):
    images = pipe(PROMPTS[0], seed=1)
    assert len(images) == 1
    assert isinstance(images[0], Image.Image)
    assert images[0].size == (24, 16)
    (other,) = pipe(PROMPTS[0], height=32, width=8, num_inference_steps=2, guidance_scale=1, seed=1)
    assert other.size == (8, 32)


def test_a_changed_sampler_is_used_from_then_on_and_not_saved(saved, pipe, tmp_path):
    expected = pipe(PROMPTS[0], num_inference_steps=2, guidance_scale=1, seed=1, output_type="np")
    pipe.change_sampler(SamplerChanges(steps=2, guidance_scale=1))
    np.testing.assert_array_equal(pipe(PROMPTS[0], seed=1, output_type="np"), expected)
    pipe.save_pretrained(tmp_path)
    assert LIDiTPipeline.from_pretrained(tmp_path).sampler.steps == 3
    with pytest.raises(InputError, match="sampling"):
        pipe.change_sampler(SamplerChanges.model_construct(steps=0))


def test_the_same_seed_gives_the_same_image_and_another_seed_another(pipe):
    first, again, other = (pipe(PROMPTS[0], seed=seed, output_type="np") for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first.astype(int) - other).max() > 10
    unseeded = [pipe(PROMPTS[0], output_type="np") for _ in range(2)]
    assert np.abs(unseeded[0].astype(int) - unseeded[1]).max() > 10


def test_an_image_depends_on_its_prompt_and_seed_not_on_its_batch(pipe):
    together = pipe(PROMPTS, seed=[3, 4, 5], output_type="pt")
    for index, prompt in enumerate(PROMPTS):
        alone = pipe(prompt, seed=3 + index, output_type="pt")
        torch.testing.assert_close(alone[0], together[index], rtol=1e-3, atol=1e-3)
    one_seed = pipe([PROMPTS[0]] * 2, seed=3, output_type="pt")
    torch.testing.assert_close(one_seed[1], one_seed[0], rtol=1e-3, atol=1e-3)
    assert (pipe(PROMPTS[1], seed=3, output_type="pt")[0] - together[0]).abs().max() > 1e-3


def test_a_prompt_of_several_images_is_read_and_refined_once(pipe):
    """With the empty caption, likewise once, for guidance; whatever their order, images are those drawn alone."""
    order, refined = [1, 0, 1, 1], []
    branch = pipe.model.conditioner.branches[0]
    hook = branch.register_forward_pre_hook(lambda _module, inputs: refined.append(len(inputs[0].states)))
    together = pipe([PROMPTS[i] for i in order], seed=range(4), guidance_scale=3, output_type="pt")
    hook.remove()
    assert set(refined) == {3}
    for place, index in enumerate(order):
        alone = pipe(PROMPTS[index], seed=place, guidance_scale=3, output_type="pt")
        torch.testing.assert_close(together[place], alone[0], rtol=1e-3, atol=1e-3)
    plain = pipe([PROMPTS[i] for i in order], seed=range(4), guidance_scale=1, output_type="pt")
    torch.testing.assert_close(
        plain[3], pipe(PROMPTS[1], seed=3, guidance_scale=1, output_type="pt")[0], rtol=1e-3, atol=1e-3
    )
    assert (together[0] - together[2]).abs().max() > 1e-3, "each image has its own noise"


def test_sampling_from_stored_states_needs_no_llm(pipe, llms):
    """States of a corpus, encoded apart from the pipeline, give the image that the prompt gives."""
    expected = pipe(PROMPTS, seed=0, output_type="pt")
    states = pipe.encode_prompts(PROMPTS)
    without = LIDiTPipeline.from_pretrained(pipe.config._name_or_path)
    for encoder in without.encoders.values():
        encoder.settings = encoder.settings.model_copy(update={"model": "nowhere"})
    torch.testing.assert_close(without(states=states, seed=0, output_type="pt"), expected, rtol=0, atol=0)
    assert all(encoder.loaded is None for encoder in without.encoders.values())


def test_online_states_are_the_stored_ones(pipe, llms, tmp_path):
    """Written to a table as a corpus does and read back, against what the pipeline computes for the same captions."""
    from lidit.store.states import decode_table, text_table

    online = pipe.encode_prompts(PROMPTS)
    for settings in llms:
        entry = pipe.encoders[settings.name]
        alone = [PromptEncoder.load(resolve_encoder(settings)).encode([prompt])[0] for prompt in PROMPTS]
        table = text_table(
            [caption.token_ids for caption in alone],
            [caption.states for caption in alone],
            settings.storage,
            mean=entry.mean,
            deviation=entry.deviation,
        )
        for row, stored in enumerate(decode_table(table, entry.mean, entry.deviation)):
            found = online[settings.name].states[row][online[settings.name].mask[row]]
            assert found.dtype == stored.dtype
            apart = (found.float() - stored.float()).abs() / entry.deviation
            assert apart.max() < 0.1  # batching moves a value by rounding, and that may tip it over one storage step
            assert (apart > 1e-4).float().mean() < 0.02


def test_llms_load_at_the_first_prompt_and_can_be_shared(pipe, saved, llms):
    assert all(encoder.loaded is None for encoder in pipe.encoders.values())
    expected = pipe(PROMPTS, seed=0, output_type="np")
    shared = {name: encoder.loaded for name, encoder in pipe.encoders.items()}
    second = LIDiTPipeline.from_pretrained(saved, encoders=shared)
    assert second.encoders["llama"].encoder() is shared["llama"]
    np.testing.assert_array_equal(second(PROMPTS, seed=0, output_type="np"), expected)
    pipe.unload_encoders()
    assert all(encoder.loaded is None for encoder in pipe.encoders.values())


def test_an_llm_found_elsewhere_is_taken_if_it_is_the_same(saved, llms, tmp_path):
    moved = shutil.copytree(llms[0].model, tmp_path / "moved")
    pipe = LIDiTPipeline.from_pretrained(saved, encoders={"llama": str(moved)})
    assert pipe.encoders["llama"].encoder().spec.folder == str(moved)
    assert LIDiTPipeline.from_pretrained(saved, encoders={"llama": moved}).encoders["llama"].encoder()
    hub = LIDiTPipeline.from_pretrained(saved, encoders={"llama": f"someone/llama@{'a' * 40}"}).encoders["llama"]
    assert (hub.settings.model, hub.settings.revision) == ("someone/llama", "a" * 40)
    other = LIDiTPipeline.from_pretrained(saved, encoders={"llama": llms[1].model})
    with pytest.raises(InputError, match=r"encoder 'llama': .* is not what the model was trained with.*weights_sha256"):
        other(PROMPTS[0])


def test_folder_is_safetensors_and_json(saved):
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


def test_llms_and_codec_go_where_the_pipeline_goes(pipe):
    pipe(PROMPTS[0], seed=0)
    pipe.to("meta")
    assert {entry.loaded.trunk.device.type for entry in pipe.encoders.values()} == {"meta"}
    pipe.unload_encoders()


def test_a_prompt_that_is_cut_is_told(pipe, caplog):
    limit = pipe.encoders["qwen"].spec["max_tokens"]
    pipe.encode_prompts([PROMPTS[0], "red " * 2 * limit])
    assert "encoder qwen: the prompt 'red red red" in caplog.text
    assert f"[...]' is cut to its first {limit} tokens" in caplog.text
    assert PROMPTS[0] not in caplog.text


def test_states_of_another_instruction_are_refused(pipe):
    """Guidance takes the empty caption's states from the model's own instruction."""
    states = pipe.encode_prompts(PROMPTS)
    qwen = states["qwen"]
    rounded = {**states, "qwen": replace(qwen, prefix=qwen.prefix.bfloat16())}
    torch.testing.assert_close(
        pipe(states=rounded, seed=0, output_type="pt"),
        pipe(states=states, seed=0, output_type="pt"),
        rtol=0.05,
        atol=0.05,
    )
    for prefix in (qwen.prefix.flip(0), qwen.prefix[1:], qwen.prefix[:0]):
        with pytest.raises(InputError, match="encoder 'qwen': these states follow another instruction"):
            pipe(states={**states, "qwen": replace(qwen, prefix=prefix)}, seed=0)


def test_saved_again_it_is_the_same_pipeline(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "again")
    again = LIDiTPipeline.from_pretrained(tmp_path / "again")
    np.testing.assert_array_equal(again(PROMPTS, seed=0, output_type="np"), pipe(PROMPTS, seed=0, output_type="np"))


def test_the_card_names_encoders_data_and_scores(saved, llms):
    card = (saved / "README.md").read_text()
    for text in (
        PAPER_INSTRUCTION,
        "0123abcd",
        "| single | 0.75 |",
        "`clean`",
        resolve_encoder(llms[0]).fingerprint,
    ):
        assert text in card


def test_bfloat16_weights_keep_exact_statistics(saved, pipe):
    half = LIDiTPipeline.from_pretrained(saved, dtype=torch.bfloat16)
    assert half.model.transformer.final_linear.weight.dtype == torch.bfloat16
    for name in ("llama", "qwen"):
        exact = pipe.model.conditioner.branch(name).projection.mean
        torch.testing.assert_close(half.model.conditioner.branch(name).projection.mean, exact, rtol=0, atol=0)
    difference = half(PROMPTS, seed=0, output_type="pt") - pipe(PROMPTS, seed=0, output_type="pt")
    assert difference.abs().mean() < 0.02
    back = half.model.double().float().conditioner.branch("llama").projection
    assert back.mean.dtype == back.deviation.dtype == torch.float32, "double precision must not stay for ever"


def test_an_autoencoder_travels_with_the_model(pipe, tmp_path):
    """Copied into the folder, so that nobody needs the path or hub id it was trained with."""
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=3, norm_num_groups=4, scaling_factor=0.7, layers_per_block=1, sample_size=16,
    ).eval()  # fmt: skip
    vae.save_pretrained(tmp_path / "elsewhere")
    pipe.codec_settings = CodecSettings(name="small", model=str(tmp_path / "elsewhere"))
    pipe.save_pretrained(tmp_path / "model")
    shutil.rmtree(tmp_path / "elsewhere")
    (tmp_path / "model").rename(tmp_path / "moved")
    loaded = LIDiTPipeline.from_pretrained(tmp_path / "moved")
    latents = loaded(PROMPTS, seed=0, output_type="latent")
    assert latents.shape == (3, 3, 8, 12)
    images = loaded(PROMPTS, seed=0, output_type="pt")
    with torch.no_grad():
        expected = vae.decode(latents / 0.7).sample / 2 + 0.5
    torch.testing.assert_close(images, expected.clamp(0, 1), rtol=1e-4, atol=1e-5)
    with pytest.raises(InputError, match="multiples of 8"):
        loaded(PROMPTS[0], height=20, width=16)


def test_offloading_draws_the_same_images(saved, pipe):
    expected = pipe(PROMPTS, seed=0, output_type="np")
    offloaded = LIDiTPipeline.from_pretrained(saved)
    offloaded.set_progress_bar_config(disable=True)
    offloaded.enable_model_cpu_offload(device="cpu")
    for _ in range(2):  # diffusers takes its hooks off and puts them on again after every call
        np.testing.assert_array_equal(offloaded(PROMPTS, seed=0, output_type="np"), expected)
        assert offloaded._offloads


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_offloading_leaves_nothing_on_the_gpu(saved, pipe):
    expected = pipe.to("cuda")(PROMPTS, seed=0, output_type="pt")
    pipe.to("cpu")
    pipe.unload_encoders()
    before = torch.cuda.memory_allocated()
    pipe.enable_model_cpu_offload()
    torch.testing.assert_close(pipe(PROMPTS, seed=0, output_type="pt"), expected, rtol=1e-3, atol=1e-3)
    assert {entry.loaded.trunk.device.type for entry in pipe.encoders.values()} == {"cpu"}
    assert torch.cuda.memory_allocated() - before < 1 << 20


def refused(saved, tmp_path, change):
    copy = shutil.copytree(saved, tmp_path / "copy")
    (copy / CHECKSUMS).unlink()  # as for a folder of the first release, or one that its owner changed
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
        (lambda folder: (folder / "encoders/qwen.json").unlink(), "encoder 'qwen', but qwen.json is missing"),
        (lambda folder: (folder / "encoders/qwen.safetensors").write_bytes(b"cut"), "encoder 'qwen' cannot be read"),
        (edit_spec, "the fingerprint does not belong to the spec"),
        (edit_sampler, "model_index.json: sampler: stepz: unknown key; did you mean 'steps'"),
        (lambda folder: (folder / "model_index.json").unlink(), "not a model folder"),
        (widen, "the model cannot be loaded"),
    ]
    for number, (change, message) in enumerate(cases):
        assert message in refused(saved, tmp_path / str(number), change)
    with pytest.raises(InputError, match="no such model folder"):
        LIDiTPipeline.from_pretrained(tmp_path / "nothing")


def test_calls_that_cannot_work_are_refused(saved, pipe):
    with pytest.raises(InputError, match="18 x 16 pixels: height and width must be multiples of 4"):
        pipe(PROMPTS[0], height=18, width=16)
    with pytest.raises(InputError, match="prompt 2: invalid UTF-8"):
        pipe(["a cat", "caf\udce9"])
    with pytest.raises(InputError, match=r"seed 18446744073709551616: .* \(64 bits\)"):
        pipe(PROMPTS[0], seed=2**64)
    with pytest.raises(InputError, match="2 seeds for 3 prompts"):
        pipe(PROMPTS, seed=[1, 2])
    with pytest.raises(InputError, match="either prompt or states"):
        pipe()
    with pytest.raises(InputError, match="at least one prompt"):
        pipe([])
    with pytest.raises(InputError, match="'ddim' cannot sample the objective 'clean'"):
        pipe(PROMPTS[0], scheduler="ddim")
    with pytest.raises(InputError, match=r"sampling: steps: .*greater than or equal to 1"):
        pipe(PROMPTS[0], num_inference_steps=0)
    with pytest.raises(InputError, match=r"sampling: guidance_interval: \(0\.8, 0\.2\) is empty"):
        pipe(PROMPTS[0], guidance_interval=(0.8, 0.2))
    with pytest.raises(InputError, match="0 x 24 pixels"):
        pipe(PROMPTS[0], height=0)
    assert not any(entry.loaded for entry in pipe.encoders.values()), "an LLM was loaded for a call that cannot work"
    with pytest.raises(InputError, match=r"states of \['qwen'\] are missing"):
        pipe(states={"llama": TextStates.collate([torch.randn(2, 32)], torch.randn(3, 32))})
    with pytest.raises(InputError, match="no encoder 'gemma'; it was trained with llama, qwen"):
        LIDiTPipeline.from_pretrained(saved, encoders={"gemma": "somewhere"})


def test_a_folder_with_only_a_pickle_is_refused(saved, tmp_path):
    """A harmless one that torch would load: another could run code. Both ways to our weights are tried."""

    def pickled(folder):
        weights = folder / "model" / "diffusion_pytorch_model.safetensors"
        torch.save(load_file(weights), weights.with_suffix(".bin"))
        weights.unlink()

    assert "no file named diffusion_pytorch_model.safetensors" in refused(saved, tmp_path, pickled)
    with pytest.raises(InputError, match=r"no file named diffusion_pytorch_model\.safetensors"):
        LIDiT.load(tmp_path / "copy" / "model")
    with pytest.raises(InputError, match="no such folder"):
        LIDiT.load(tmp_path / "absent")
