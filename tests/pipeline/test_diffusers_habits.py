"""What callers of diffusers pipelines write, written to this one."""

import numpy as np
import pytest
import torch
from diffusers.callbacks import PipelineCallback
from PIL import Image

from lidit.errors import InputError
from lidit.pipeline import LIDiTPipeline, image_bytes
from tests.helpers.prompts import PROMPTS
from tests.helpers.random_pipeline import random_pipeline, random_states


@pytest.fixture(scope="package")
def reader(saved):
    """A pipeline whose LLMs stay loaded from test to test."""
    pipeline = LIDiTPipeline.from_pretrained(saved)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def drawer():
    """A pipeline without LLMs that draws from states."""
    return random_pipeline("clean")


def states_of(pipeline, *lengths):
    rows = [random_states(length, length) for length in lengths]
    return {
        name: entry.collate([row[name] for row in rows])
        for name, entry in pipeline.encoders.items()
    }


def drawn(pipeline, **options):
    return pipeline(output_type="latent", **options).images


def test_images_are_an_attribute_and_the_output_is_their_list(reader):
    found = reader(PROMPTS[:2], seed=[1, 2])
    assert [type(image) for image in found.images] == [Image.Image] * 2
    assert found[0] is found.images[0]
    assert list(found) == found.images
    assert len(found) == 2
    (images,) = reader(PROMPTS[:2], seed=[1, 2], return_dict=False)
    assert [image.tobytes() for image in images] == [image.tobytes() for image in found.images]


def test_a_pipeline_of_another_ones_components_draws_the_same(reader):
    again = LIDiTPipeline(**reader.components)
    again.set_progress_bar_config(disable=True)
    assert again(PROMPTS[0], seed=1)[0].tobytes() == reader(PROMPTS[0], seed=1)[0].tobytes()
    assert LIDiTPipeline(**reader.components, sampler={"steps": 2}).sampler.steps == 2


def test_sizes_may_be_given_by_place(reader):
    by_place = reader(PROMPTS[0], 32, 8, seed=1)[0]
    assert by_place.size == (8, 32)
    assert by_place.tobytes() == reader(PROMPTS[0], height=32, width=8, seed=1)[0].tobytes()


def test_each_form_shows_the_same_picture(drawer):
    states = states_of(drawer, 3, 5)
    forms = {
        form: drawer(states=states, seed=0, output_type=form).images
        for form in ("pil", "np", "pt", "latent")
    }
    assert forms["np"].dtype == np.float32
    assert forms["np"].shape == (2, 16, 16, 3)
    np.testing.assert_array_equal(forms["np"].transpose(0, 3, 1, 2), forms["pt"].numpy())
    assert 0 <= forms["np"].min() < forms["np"].max() <= 1
    np.testing.assert_array_equal(np.stack(forms["pil"]), image_bytes(forms["pt"]))
    torch.testing.assert_close(forms["pt"], ((forms["latent"] + 1) / 2).clamp(0, 1), rtol=0, atol=0)


def test_a_generator_draws_what_its_seed_draws(drawer):
    states = states_of(drawer, 3, 5)
    expected = drawn(drawer, states=states, seed=[1, 2])
    apart = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    assert torch.equal(drawn(drawer, states=states, generator=apart), expected)
    one = drawn(drawer, states=states, generator=torch.Generator().manual_seed(1))
    assert torch.equal(one[0], expected[0])
    assert (one[1] - expected[1]).abs().max() > 0.01, (
        "the second image goes on where the first one ended"
    )
    generator = torch.Generator().manual_seed(1)
    first, second = (drawn(drawer, states=states, generator=generator) for _ in range(2))
    assert (first - second).abs().max() > 0.01, "a generator moves on"


@pytest.mark.parametrize("kind", ["clean", "ddpm"])
def test_latents_are_the_noise_to_start_from(kind):
    drawer = random_pipeline(kind)
    states = states_of(drawer, 3)
    noise = torch.randn((1, 3, 16, 16), generator=torch.Generator().manual_seed(5))
    assert torch.equal(
        drawn(drawer, states=states, latents=noise), drawn(drawer, states=states, seed=5)
    )
    large = torch.randn((1, 3, 24, 8), generator=torch.Generator().manual_seed(5))
    assert torch.equal(
        drawn(drawer, states=states, latents=large),
        drawn(drawer, states=states, seed=5, height=24, width=8),
    )


def test_images_per_prompt_count_seeds_up(reader):
    found = drawn(reader, prompt=PROMPTS[:2], num_images_per_prompt=2, seed=[1, 7])
    written = [PROMPTS[0], PROMPTS[0], PROMPTS[1], PROMPTS[1]]
    assert torch.equal(found, drawn(reader, prompt=written, seed=[1, 2, 7, 8]))
    assert torch.equal(
        found, drawn(reader, prompt=PROMPTS[:2], num_images_per_prompt=2, seed=[1, 2, 7, 8])
    )
    assert (found[0] - found[1]).abs().max() > 0.01


def test_a_negative_prompt_takes_the_empty_captions_place(reader):
    plain = drawn(reader, prompt=PROMPTS[:2], seed=1)
    assert torch.equal(drawn(reader, prompt=PROMPTS[:2], seed=1, negative_prompt=""), plain)
    away = drawn(reader, prompt=PROMPTS[:2], seed=1, negative_prompt=PROMPTS[2])
    assert (away - plain).abs().flatten(1).amax(1).min() > 1e-3
    # One for each, and each by itself: a picture does not depend on its neighbours'.
    pair = drawn(reader, prompt=PROMPTS[:2], seed=1, negative_prompt=[PROMPTS[2], PROMPTS[0]])
    torch.testing.assert_close(pair[0], away[0], rtol=1e-3, atol=1e-3)
    alone = drawn(reader, prompt=PROMPTS[1], seed=1, negative_prompt=PROMPTS[0])
    torch.testing.assert_close(pair[1], alone[0], rtol=1e-3, atol=1e-3)
    same = drawn(reader, prompt=PROMPTS[0], seed=1, negative_prompt=PROMPTS[0])
    unguided = drawn(reader, prompt=PROMPTS[0], seed=1, guidance_scale=1)
    torch.testing.assert_close(
        same, unguided, rtol=1e-3, atol=1e-3, msg="guidance has nothing to lead away from"
    )


def test_states_come_by_diffusers_names(reader):
    embeds, negative = reader.encode_prompts(PROMPTS[:1]), reader.encode_prompts(PROMPTS[2:])
    expected = drawn(
        reader, prompt=PROMPTS[0], negative_prompt=PROMPTS[2], num_images_per_prompt=2, seed=4
    )
    found = drawn(
        reader,
        prompt_embeds=embeds,
        negative_prompt_embeds=negative,
        num_images_per_prompt=2,
        seed=4,
    )
    assert torch.equal(found, expected)


def test_a_callback_sees_changes_and_ends_the_walk(drawer):
    states, seen = states_of(drawer, 3), []

    def look(pipe, step, timestep, tensors):
        seen.append((pipe, step, float(timestep), tensors["latents"].clone()))
        return tensors

    whole = drawn(drawer, states=states, seed=0, callback_on_step_end=look)
    assert [step for _, step, _, _ in seen] == [0, 1, 2, 3]
    assert [timestep for _, _, timestep, _ in seen] == [1000, 750, 500, 250]
    assert seen[0][0] is drawer
    assert drawer.num_timesteps == 4
    assert torch.equal(seen[-1][3], whole)
    assert torch.equal(whole, drawn(drawer, states=states, seed=0))

    def stop(pipe, step, timestep, tensors):
        assert tensors == {}
        pipe._interrupt = step == 1
        return {}

    ended = drawn(
        drawer,
        states=states,
        seed=0,
        callback_on_step_end=stop,
        callback_on_step_end_tensor_inputs=[],
    )
    assert drawer.interrupt
    assert torch.equal(ended, seen[1][3])

    def change(pipe, step, timestep, tensors):
        return {"latents": torch.zeros_like(tensors["latents"])}

    assert (drawn(drawer, states=states, seed=0, callback_on_step_end=change) == 0).all()


def test_a_callback_object_of_diffusers_is_taken(drawer):
    class Halve(PipelineCallback):
        tensor_inputs = ["latents"]

        def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
            return (
                {"latents": callback_kwargs["latents"] / 2} if step_index == 3 else callback_kwargs
            )

    states = states_of(drawer, 3)
    halved = drawn(drawer, states=states, seed=0, callback_on_step_end=Halve(cutoff_step_ratio=1.0))
    assert torch.equal(halved, drawn(drawer, states=states, seed=0) / 2)


def test_the_parts_have_diffusers_names(reader):
    assert reader.transformer is reader.model.transformer
    assert reader.vae is None, "latents are pixels"
    reader.enable_vae_slicing()
    assert reader.text_encoders.keys() == reader.tokenizers.keys() == {"llama", "qwen"}
    ids = reader.tokenizers["qwen"](PROMPTS[1], return_tensors="pt").input_ids
    states = reader.text_encoders["qwen"](input_ids=ids).last_hidden_state
    assert states.shape == (1, ids.shape[1], 48)


REFUSED = [
    ({"output_type": "jpg"}, "output_type: 'jpg' is none of pil, np, pt, latent"),
    ({"seed": 1, "generator": torch.Generator()}, "either seed or generator"),
    ({"generator": [torch.Generator()] * 2}, "2 generators for 1 images"),
    (
        {"latents": torch.zeros(2, 3, 16, 24)},
        r"latents of shape \(2, 3, 16, 24\): these images need \(1, 3, 16, " r"24\)",
    ),
    ({"latents": torch.zeros(1, 3, 16, 24), "height": 32}, r"these images need \(1, 3, 32, 24\)"),
    ({"num_images_per_prompt": 0}, "num_images_per_prompt: 0"),
    ({"num_images_per_prompt": 3, "seed": [1, 2]}, "2 seeds for 1 prompts with 3 images each"),
    ({"negative_prompt": ["a", "b"]}, "2 negative prompts for 1 prompts"),
    ({"negative_prompt": "caf\udce9"}, "prompt 1: invalid UTF-8"),
    ({"timesteps": [1000, 500], "sigmas": [1.0, 0.5]}, "either timesteps or sigmas"),
    ({"sigmas": []}, "at least one step"),
    ({"sigmas": [0.5, 1.0]}, "noise levels must fall"),
    ({"sigmas": [1.5, 1.0]}, "noise levels must fall"),
    (
        {"callback_on_step_end": print, "callback_on_step_end_tensor_inputs": ["noise"]},
        "noise: a callback can have",
    ),
]


@pytest.mark.parametrize(
    ("options", "message"), REFUSED, ids=[next(iter(options)) for options, _ in REFUSED]
)
def test_what_cannot_work_is_refused_before_an_llm_is_loaded(pipe, options, message):
    with pytest.raises(InputError, match=message):
        pipe(PROMPTS[0], **options)
    assert not any(entry.loaded for entry in pipe.encoders.values())
