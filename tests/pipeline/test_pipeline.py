"""From prompts or their states to images, with small random LLMs."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from lidit.errors import InputError
from lidit.models import TextStates
from lidit.pipeline import LIDiTPipeline
from lidit.text import PromptEncoder, resolve_encoder
from tests.helpers.prompts import PROMPTS


def test_prompt_to_image(pipe):
    images = pipe(PROMPTS[0], seed=1)
    assert len(images) == 1
    assert isinstance(images[0], Image.Image)
    assert images[0].size == (24, 16)
    (other,) = pipe(PROMPTS[0], height=32, width=8, num_inference_steps=2, guidance_scale=1, seed=1)
    assert other.size == (8, 32)


def test_the_same_seed_gives_the_same_image_and_another_seed_another(pipe):
    first, again, other = (
        pipe(PROMPTS[0], seed=seed, output_type="np").images for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 0.04
    unseeded = [pipe(PROMPTS[0], output_type="np").images for _ in range(2)]
    assert np.abs(unseeded[0] - unseeded[1]).max() > 0.04


def test_an_image_depends_on_its_prompt_and_seed_not_on_its_batch(pipe):
    together = pipe(PROMPTS, seed=[3, 4, 5], output_type="pt").images
    for index, prompt in enumerate(PROMPTS):
        alone = pipe(prompt, seed=3 + index, output_type="pt").images
        torch.testing.assert_close(alone[0], together[index], rtol=1e-3, atol=1e-3)
    one_seed = pipe([PROMPTS[0]] * 2, seed=3, output_type="pt").images
    torch.testing.assert_close(one_seed[1], one_seed[0], rtol=1e-3, atol=1e-3)
    assert (pipe(PROMPTS[1], seed=3, output_type="pt").images[0] - together[0]).abs().max() > 1e-3


def test_a_prompt_of_several_images_is_read_and_refined_once(pipe):
    """With the empty caption, likewise once, for guidance; whatever their order, images are those
    drawn alone.
    """
    order, refined = [1, 0, 1, 1], []
    branch = pipe.model.conditioner.branches[0]
    hook = branch.register_forward_pre_hook(
        lambda _module, inputs: refined.append(len(inputs[0].states))
    )
    together = pipe(
        [PROMPTS[i] for i in order], seed=range(4), guidance_scale=3, output_type="pt"
    ).images
    hook.remove()
    assert set(refined) == {3}
    for place, index in enumerate(order):
        alone = pipe(PROMPTS[index], seed=place, guidance_scale=3, output_type="pt").images
        torch.testing.assert_close(together[place], alone[0], rtol=1e-3, atol=1e-3)
    plain = pipe(
        [PROMPTS[i] for i in order], seed=range(4), guidance_scale=1, output_type="pt"
    ).images
    torch.testing.assert_close(
        plain[3],
        pipe(PROMPTS[1], seed=3, guidance_scale=1, output_type="pt").images[0],
        rtol=1e-3,
        atol=1e-3,
    )
    assert (together[0] - together[2]).abs().max() > 1e-3, "each image has its own noise"


def test_sampling_from_stored_states_needs_no_llm(pipe, llms):
    """States of a corpus, encoded apart from the pipeline, give the image that the prompt gives."""
    expected = pipe(PROMPTS, seed=0, output_type="pt").images
    states = pipe.encode_prompts(PROMPTS)
    without = LIDiTPipeline.from_pretrained(pipe.config._name_or_path)
    for encoder in without.encoders.values():
        encoder.settings = encoder.settings.model_copy(update={"model": "nowhere"})
    torch.testing.assert_close(
        without(states=states, seed=0, output_type="pt").images, expected, rtol=0, atol=0
    )
    assert all(encoder.loaded is None for encoder in without.encoders.values())


def test_online_states_are_the_stored_ones(pipe, llms, tmp_path):
    """Written to a table as a corpus does and read back, against what the pipeline computes for the
    same captions.
    """
    from lidit.store.states import decode_table, text_table

    online = pipe.encode_prompts(PROMPTS)
    for settings in llms:
        entry = pipe.encoders[settings.name]
        alone = [
            PromptEncoder.load(resolve_encoder(settings)).encode([prompt])[0] for prompt in PROMPTS
        ]
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
            # batching moves a value by rounding, and that may tip it over one storage step
            assert apart.max() < 0.1
            assert (apart > 1e-4).float().mean() < 0.02


def test_llms_load_at_the_first_prompt_and_can_be_shared(pipe, saved, llms):
    assert all(encoder.loaded is None for encoder in pipe.encoders.values())
    expected = pipe(PROMPTS, seed=0, output_type="np").images
    shared = {name: encoder.loaded for name, encoder in pipe.encoders.items()}
    second = LIDiTPipeline.from_pretrained(saved, encoders=shared)
    assert second.encoders["llama"].encoder() is shared["llama"]
    np.testing.assert_array_equal(second(PROMPTS, seed=0, output_type="np").images, expected)
    pipe.unload_encoders()
    assert all(encoder.loaded is None for encoder in pipe.encoders.values())


def test_llms_and_codec_go_where_the_pipeline_goes(pipe):
    pipe(PROMPTS[0], seed=0)
    pipe.to("meta")
    assert {entry.loaded.trunk.device.type for entry in pipe.encoders.values()} == {"meta"}
    pipe.unload_encoders()


def test_a_prompt_is_read_in_the_form_in_which_captions_are_stored(pipe):
    encoder = next(iter(pipe.encoders.values()))
    stored, typed = encoder.encode(["a caf\u00e9", "  a cafe\u0301\n"])
    assert torch.equal(stored, typed)


def test_a_prompt_that_is_cut_is_told(pipe, caplog):
    limit = pipe.encoders["qwen"].spec["max_tokens"]
    pipe.encode_prompts([PROMPTS[0], "red " * 2 * limit])
    assert (
        f"encoder qwen: cut to their first {limit} tokens, more were not used in training"
        in caplog.text
    )
    assert "1 of 2 prompts" in caplog.text
    # logs outlive requests: no word of a prompt is in them
    assert "red" not in caplog.text.replace("trained", "")


def test_states_of_another_instruction_are_refused(pipe):
    """Guidance takes the empty caption's states from the model's own instruction."""
    states = pipe.encode_prompts(PROMPTS)
    qwen = states["qwen"]
    rounded = {**states, "qwen": replace(qwen, prefix=qwen.prefix.bfloat16())}
    torch.testing.assert_close(
        pipe(states=rounded, seed=0, output_type="pt").images,
        pipe(states=states, seed=0, output_type="pt").images,
        rtol=0.05,
        atol=0.05,
    )
    for prefix in (qwen.prefix.flip(0), qwen.prefix[1:], qwen.prefix[:0]):
        with pytest.raises(
            InputError, match="encoder 'qwen': these states follow another instruction"
        ):
            pipe(states={**states, "qwen": replace(qwen, prefix=prefix)}, seed=0)


def test_offloading_draws_the_same_images(saved, pipe):
    expected = pipe(PROMPTS, seed=0, output_type="np").images
    offloaded = LIDiTPipeline.from_pretrained(saved)
    offloaded.set_progress_bar_config(disable=True)
    offloaded.enable_model_cpu_offload(device="cpu")
    for _ in range(2):  # diffusers takes its hooks off and puts them on again after every call
        np.testing.assert_array_equal(offloaded(PROMPTS, seed=0, output_type="np").images, expected)
        assert offloaded._offloads


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_offloading_leaves_nothing_on_the_gpu(saved, pipe):
    expected = pipe.to("cuda")(PROMPTS, seed=0, output_type="pt").images
    pipe.to("cpu")
    pipe.unload_encoders()
    before = torch.cuda.memory_allocated()
    pipe.enable_model_cpu_offload()
    torch.testing.assert_close(
        pipe(PROMPTS, seed=0, output_type="pt").images, expected, rtol=1e-3, atol=1e-3
    )
    assert {entry.loaded.trunk.device.type for entry in pipe.encoders.values()} == {"cpu"}
    assert torch.cuda.memory_allocated() - before < 1 << 20


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
    assert not any(entry.loaded for entry in pipe.encoders.values()), (
        "an LLM was loaded for a call that cannot work"
    )
    with pytest.raises(InputError, match=r"states of \['qwen'\] are missing"):
        pipe(states={"llama": TextStates.collate([torch.randn(2, 32)], torch.randn(3, 32))})
    with pytest.raises(InputError, match="no encoder 'gemma'; it was trained with llama, qwen"):
        LIDiTPipeline.from_pretrained(saved, encoders={"gemma": "somewhere"})
