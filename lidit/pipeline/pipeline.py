"""Prompt -> image: the object a user loads and calls as any pipeline of diffusers.

Shapes: B images, C latent channels, H x W latent size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback

from lidit.config import SamplerChanges, SamplerSettings
from lidit.config.json_object import read_object
from lidit.config.settings import validate
from lidit.diffusion import GuidedPredictor, Schedule, Walk
from lidit.diffusion.guidance import NO_NEGATIVE
from lidit.errors import InputError, one_line
from lidit.models import LIDiT, TextStates
from lidit.pipeline.callback import OnStep, StepCallback
from lidit.pipeline.checksums import check_model
from lidit.pipeline.components import ENCODERS, INDEX
from lidit.pipeline.inputs import (
    Captions,
    Randomness,
    States,
    negative_captions,
    seed_per_image,
    size_of,
)
from lidit.pipeline.model_encoder import ModelEncoder
from lidit.pipeline.output import LIDiTPipelineOutput, OutputType, as_images, check_output_type
from lidit.pipeline.places import (
    device_of,
    local_folder,
    network_config,
    one_dtype,
    replace_encoder,
)
from lidit.pipeline.sharing import ShareableParts
from lidit.text import PromptEncoder


class LIDiTPipeline(ShareableParts):
    """Samples images of prompts. Load with `from_pretrained`; call with prompts, or with states
    computed before.

    Args:
        model: The network.
        objective: Settings as plain values, as model_index.json holds them.
        sampler: The same.
        codec: The same.
        height: Of an image unless the call says otherwise, pixels: the training size.
        width: The same.
    """

    _callback_tensor_inputs = ["latents"]
    _interrupt = False
    _num_timesteps = 0

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        revision: str | None = None,
        dtype: torch.dtype | None = None,
        encoders: Mapping[str, str | Path | PromptEncoder] | None = None,
        check_files: bool | None = None,
        *,
        torch_dtype: torch.dtype | None = None,
        device_map: str | None = None,
        variant: str | None = None,
        local_files_only: bool = False,
        quantization_config: Any = None,
    ) -> Self:
        """Load a model folder that `lidit train` wrote. No LLM is loaded before a prompt needs it.

        Args:
            folder: The model folder, or a hub id.
            revision: Commit of a hub id.
            dtype: Of the weights; None keeps them as saved.
            encoders: Encoder name -> an encoder that is already loaded, to share it; or the folder
                where its files are
                on this machine; or a hub id as `id@commit`.
            check_files: Compare every file with the checksums it was saved with; None does so below
                20 GB.
            torch_dtype: The same as `dtype`, by its older name.
            device_map: The device that all parts go to, such as "cuda".
            variant: Which of several saved sets of the network's weights, such as "bf16".
            local_files_only: Never ask the hub for the folder: it was fetched before.
            quantization_config: How the network's linear layers are stored: diffusers'
                `TorchAoConfig` and the like, or
                a `PipelineQuantizationConfig`, whose entry `model` or `transformer` is taken. LLMs
                and codec stay as they are.

        Returns:
            The pipeline, on the CPU unless `device_map` says otherwise; `to("cuda")` moves it.

        Raises:
            InputError: The folder is no model folder, an encoder's files are missing, or a shared
                encoder is not the
                one of the training.
        """
        device, dtype = device_of(device_map), one_dtype(dtype, torch_dtype)
        path = local_folder(folder, revision, local_files_only)
        if not (path / INDEX).is_file():
            raise InputError(
                f"{path}: no {INDEX}, so this is not a model folder written by lidit train"
            )
        check_model(path, check_files)
        # diffusers takes whatever the file holds for an object, a text even for a name on the hub.
        read_object(path / INDEX, "copy the model folder again")
        try:
            quantized = network_config(quantization_config)
            model = LIDiT.load(path / "model", dtype, variant, quantized)
            # Without the flag a folder that has only a pickle is opened as one, and a pickle can
            # run code.
            pipeline = super().from_pretrained(
                str(path), model=model, torch_dtype=dtype, use_safetensors=True
            )
        except (OSError, ValueError, TypeError, KeyError) as error:
            reason = one_line(error)[:300]
            raise InputError(
                f"{path}: the model cannot be loaded ({reason}); fetch or train it again"
            ) from None
        pipeline.model.eval()
        names = pipeline.model.conditioner.names
        pipeline.encoders = {name: ModelEncoder.load(path / ENCODERS, name) for name in names}
        for name, replacement in (encoders or {}).items():
            if name not in pipeline.encoders:
                raise InputError(
                    f"the model has no encoder {name!r}; it was trained with {', '.join(names)}"
                )
            replace_encoder(pipeline.encoders[name], replacement)
        return pipeline if device is None else pipeline.to(device)

    # The names and the flat form that callers of diffusers pipelines expect.
    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        *,
        num_inference_steps: int | None = None,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        guidance_scale: float | None = None,
        guidance_interval: tuple[float, float] | None = None,
        guidance_rescale: float | None = None,
        scheduler: str | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        num_images_per_prompt: int = 1,
        seed: int | Sequence[int] | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        states: States | None = None,
        prompt_embeds: States | None = None,
        negative_prompt_embeds: States | None = None,
        output_type: OutputType = "pil",
        return_dict: bool = True,
        callback_on_step_end: OnStep | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> Any:
        """Sample images of the prompts, in their order.

        Args:
            prompt: One or more captions, each encoded once however often it is given.
            height: Pixels, a multiple of codec factor x patch size. Default: that of `latents`,
                else the training size.
            width: The same.
            num_inference_steps: Sampling steps. Default, here and below: the model's own settings.
            timesteps: The steps themselves, in the scheduler's units, for schedulers that take
                them.
            sigmas: The steps themselves, as noise levels from 1 down, for schedulers that take
                them.
            guidance_scale: Weight of the prompt against the empty caption; 1 is no guidance.
            guidance_interval: Timesteps (low, high) in [0, 1] between which guidance acts.
            guidance_rescale: Share in [0, 1] by which guided predictions get back their standard
                deviation.
            scheduler: Name of the sampler's method, "auto" for the objective's first. Default:
                `pipe.scheduler`.
            negative_prompt: What guidance leads away from, in place of the empty caption: one, or
                one per prompt.
            num_images_per_prompt: Images of each prompt, one after the other.
            seed: One for all prompts, or one per prompt, or one per image: an image depends on its
                prompt and seed,
                not on the batch. The images of one prompt take the seed, seed + 1, and so on. None
                draws seeds at random.
            generator: In place of seeds: one per image, or one that all images draw from in turn.
            latents: Noise to start from, [B, C, H, W], in place of the one that seeds or generators
                give.
            states: In place of prompts, encoder name -> states of captions, from `encode_prompts`
                or a corpus.
            prompt_embeds: The same as `states`, by diffusers' name.
            negative_prompt_embeds: The same for `negative_prompt`.
            output_type: "pil" gives a list of images; "np" float32 [B, height, width, 3] in [0, 1];
                "pt" float32
                [B, 3, height, width] in [0, 1]; "latent" the latents [B, C, H, W], not decoded.
            return_dict: False gives the tuple (images,).
            callback_on_step_end: Called after each step with the pipeline, the step's number, its
                timestep and
                {"latents": latents}; it may give back {"latents": others}. `pipe._interrupt = True`
                ends the walk.
            callback_on_step_end_tensor_inputs: What the callback is given: "latents", or nothing.

        Returns:
            `LIDiTPipelineOutput`, whose `images` have the form that `output_type` names.

        Raises:
            InputError: A wrong size, a missing encoder, states of another instruction, a scheduler
                that does not fit,
                a prompt that is no text, a seed of more than 64 bits, or a number of seeds that is
                neither one nor that of the prompts.
        """
        # 1. Refuse what cannot work before the LLMs are loaded.
        check_output_type(output_type)
        callback = StepCallback.of(callback_on_step_end, callback_on_step_end_tensor_inputs)
        if states is not None and prompt_embeds is not None:
            raise InputError("states and prompt_embeds are the same: give one of them")
        each = Captions.listed(prompt, prompt_embeds if states is None else states)
        captions = each.repeated(num_images_per_prompt)
        negative = negative_captions(negative_prompt, negative_prompt_embeds, len(each.rows))
        shape = self.latent_shape(*size_of(latents, self.codec.factor, height, width))
        changes = {
            "steps": num_inference_steps,
            "guidance_scale": guidance_scale,
            "guidance_interval": guidance_interval,
            "guidance_rescale": guidance_rescale,
            "scheduler": scheduler,
        }
        sampler = validate(SamplerChanges, changes, "sampling").applied(self.sampler)
        schedule = Schedule(None if scheduler else self._scheduler, timesteps, sigmas)
        prepared = schedule.prepared(self.objective, sampler)
        if generator is not None and seed is not None:
            raise InputError("give either seed or generator")
        seeds = seed_per_image(seed, len(each.rows), num_images_per_prompt)
        randomness = Randomness.of(generator, seeds, latents)
        noise = randomness.noise(shape, self._execution_device)
        # 2. States of the prompts and of what guidance leads away from, on the network's device.
        text = self._text(captions)
        empty, empty_rows = self._away(negative, num_images_per_prompt, sampler)
        # 3. Walk from noise to latents.
        walk = Walk(self.objective, noise, sampler, randomness.generators, prepared)
        drawn = self._denoise(
            walk,
            GuidedPredictor(self.model, text, empty, sampler, captions.rows, empty_rows),
            callback,
        )
        # 4. Decode.
        images = drawn if output_type == "latent" else self._decode(drawn, output_type)
        return LIDiTPipelineOutput(images) if return_dict else (images,)

    @property
    def interrupt(self) -> bool:
        """Whether a callback ended the walk: it sets `pipe._interrupt = True`."""
        return self._interrupt

    @property
    def num_timesteps(self) -> int:
        """Steps of the latest call."""
        return self._num_timesteps

    def _text(self, captions: Captions) -> dict[str, TextStates]:
        """The captions' states on the network's device; raises InputError for states that are not
        this model's.
        """
        states = (
            captions.states if captions.prompts is None else self.encode_prompts(captions.prompts)
        )
        assert states is not None
        text = {name: entry.to(self._execution_device) for name, entry in states.items()}
        self.model.conditioner.check(text)
        for name, entry in self.encoders.items():
            entry.require_instruction(text[name].prefix)
        return text

    def _away(
        self, negative: Captions | None, each: int, sampler: SamplerSettings
    ) -> tuple[dict[str, TextStates], list[int] | None]:
        """States that guidance leads away from, and each image's among them; of the empty caption
        unless told.
        """
        if negative is not None and self.model.takes_guidance:
            raise InputError(NO_NEGATIVE)
        if negative is not None and sampler.guidance_scale != 1:
            return self._text(negative), negative.repeated(each).rows
        device = self._execution_device
        return {
            name: entry.collate([entry.empty]).to(device) for name, entry in self.encoders.items()
        }, None

    def _denoise(
        self, walk: Walk, predict: GuidedPredictor, callback: StepCallback | None
    ) -> torch.Tensor:
        """Latents [B, C, H, W] at the end of the walk, or where the callback ended it."""
        self._interrupt, self._num_timesteps = False, len(walk.levels)
        with self.progress_bar(total=len(walk.levels)) as bar:
            while not walk.finished and not self._interrupt:
                number, timestep = walk.number, walk.scheduler.timesteps[walk.number]
                walk.advance(predict(walk.network_input, walk.t))
                if callback is not None:
                    walk.latents = callback(self, number, timestep, walk.latents)
                bar.update()
        self.maybe_free_model_hooks()
        return walk.latents

    def _decode(self, latents: torch.Tensor, output_type: str) -> Any:
        """Images in the form that was asked for; the codec leaves the GPU again where parts are
        offloaded.
        """
        images = self.codec.decode(latents)
        if self._offloads:
            self.codec.to("cpu")
        return as_images(images, output_type)
