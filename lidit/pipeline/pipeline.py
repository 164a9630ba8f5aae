"""Prompt -> image: the object a user loads, and the folder it is loaded from.

    FOLDER/model_index.json   class, objective, sampler and codec settings, training size
           model/             LIDiT: config.json + safetensors
           vae/               the autoencoder, unless latents are pixels
           encoders/NAME.*    one LLM each: its identity, and the prefix and empty states training used
           README.md          model card

Shapes: B batch, C latent channels, H x W latent size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
from PIL import Image

from lidit.codecs import AutoencoderCodec, Codec, load_codec
from lidit.config import CodecSettings, ObjectiveSettings, SamplerChanges, SamplerSettings
from lidit.config.json_object import read_object
from lidit.config.settings import validate
from lidit.diffusion import GuidedPredictor, build_objective, initial_noise, sample, seeded_generators
from lidit.errors import InputError, one_line
from lidit.hub import fetch_snapshot, is_hub_id
from lidit.models import LIDiT, TextStates
from lidit.pipeline.checksums import check_model, write_checksums
from lidit.pipeline.inputs import image_count, listed_prompts, seed_per_image
from lidit.pipeline.model_encoder import ModelEncoder
from lidit.pixels import unit_to_bytes
from lidit.text import PromptEncoder

ENCODERS, VAE = "encoders", "vae"
INDEX = "model_index.json"


class LIDiTPipeline(DiffusionPipeline):
    """Samples images of prompts. Load with `from_pretrained`; call with prompts, or with states computed before.

    Args:
        model: The network.
        objective: Settings as plain values, as model_index.json holds them.
        sampler: The same.
        codec: The same.
        height: Of an image unless the call says otherwise, pixels: the training size.
        width: The same.
    """

    model_cpu_offload_seq = "model"
    encoders: dict[str, ModelEncoder]

    def __init__(
        self,
        model: LIDiT,
        objective: dict[str, Any] | None = None,
        sampler: dict[str, Any] | None = None,
        codec: dict[str, Any] | None = None,
        height: int = 256,
        width: int = 256,
    ) -> None:
        super().__init__()
        self.register_modules(model=model)
        self.register_to_config(objective=objective, sampler=sampler, codec=codec, height=height, width=width)
        self.objective = build_objective(validate(ObjectiveSettings, objective or {}, f"{INDEX}: objective"))
        self.sampler = validate(SamplerSettings, sampler or {}, f"{INDEX}: sampler")
        self.codec_settings = validate(CodecSettings, codec or {}, f"{INDEX}: codec")
        self.encoders = {}
        self._codec: Codec | None = None

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        revision: str | None = None,
        dtype: torch.dtype | None = None,
        encoders: Mapping[str, str | Path | PromptEncoder] | None = None,
        check_files: bool | None = None,
    ) -> Self:
        """Load a model folder that `lidit train` wrote. No LLM is loaded before a prompt needs it.

        Args:
            folder: The model folder, or a hub id.
            revision: Commit of a hub id.
            dtype: Of the weights; None keeps them as saved.
            encoders: Encoder name -> an encoder that is already loaded, to share it; or the folder where its files are
                on this machine; or a hub id as `id@commit`.
            check_files: Compare every file with the checksums it was saved with; None does so below 20 GB.

        Returns:
            The pipeline, on the CPU; `to("cuda")` moves it.

        Raises:
            InputError: The folder is no model folder, an encoder's files are missing, or a shared encoder is not the
                one of the training.
        """
        path = _local_folder(folder, revision)
        if not (path / INDEX).is_file():
            raise InputError(f"{path}: no {INDEX}, so this is not a model folder written by lidit train")
        check_model(path, check_files)
        # diffusers takes whatever the file holds for an object, a text even for a name on the hub.
        read_object(path / INDEX, "copy the model folder again")
        try:
            model = LIDiT.load(path / "model", dtype)
            # Without the flag a folder that has only a pickle is opened as one, and a pickle can run code.
            pipeline = super().from_pretrained(str(path), model=model, torch_dtype=dtype, use_safetensors=True)
        except (OSError, ValueError, TypeError, KeyError) as error:
            reason = one_line(error)[:300]
            raise InputError(f"{path}: the model cannot be loaded ({reason}); fetch or train it again") from None
        pipeline.model.eval()
        if pipeline.codec_settings.model == VAE:
            pipeline.codec_settings = pipeline.codec_settings.model_copy(update={"model": str(path / VAE)})
        names = pipeline.model.conditioner.names
        pipeline.encoders = {name: ModelEncoder.load(path / ENCODERS, name) for name in names}
        for name, replacement in (encoders or {}).items():
            if name not in pipeline.encoders:
                raise InputError(f"the model has no encoder {name!r}; it was trained with {', '.join(names)}")
            _replace_encoder(pipeline.encoders[name], replacement)
        return pipeline

    def save_pretrained(self, save_directory: str | Path, max_shard_size: str = "5GB") -> None:
        """Write the folder that `from_pretrained` reads, without the model card.

        Args:
            save_directory: The folder; files of an earlier save are replaced.
            max_shard_size: Largest safetensors file of the network.
        """
        if self.codec_settings.model is not None:
            exact = load_codec(self.codec_settings.model_copy(update={"dtype": "float32"}))
            assert isinstance(exact, AutoencoderCodec)
            exact.model.save_pretrained(Path(save_directory) / VAE, safe_serialization=True)
            inside = self.codec_settings.model_copy(update={"model": VAE, "revision": None})
            self.register_to_config(codec=inside.model_dump(mode="json"))
        # diffusers would leave the index of a save in shards, and could not load what is saved whole over it.
        (Path(save_directory) / "model" / f"{SAFETENSORS_WEIGHTS_NAME}.index.json").unlink(missing_ok=True)
        super().save_pretrained(str(save_directory), safe_serialization=True, max_shard_size=max_shard_size)
        for encoder in self.encoders.values():
            encoder.save(Path(save_directory) / ENCODERS)
        write_checksums(Path(save_directory))

    @property
    def codec(self) -> Codec:
        """The codec, loaded when the first latents are decoded."""
        if self._codec is None:
            self._codec = load_codec(self.codec_settings, str(self._execution_device))
            if self._offloads:
                self._codec.to("cpu")
        return self._codec

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Move as in diffusers; LLMs and codec that are loaded go along, in the dtypes they have.

        Args:
            args: A device, a dtype, or both.
            kwargs: The same by name.

        Returns:
            This pipeline.
        """
        super().to(*args, **kwargs)
        self._move_parts(self.model.device)
        return self

    def _move_parts(self, device: torch.device | str) -> None:
        """Move the loaded LLMs and codec, which diffusers does not know of."""
        for entry in self.encoders.values():
            if entry.loaded is not None:
                entry.loaded.to(str(device))
        if self._codec is not None:
            self._codec.to(device)

    def encode_prompts(self, prompts: Sequence[str]) -> dict[str, TextStates]:
        """Encode prompts with all of the model's LLMs: the values that a corpus would hold for these captions.

        Args:
            prompts: B texts.

        Returns:
            Encoder name -> states [B, T, W], mask [B, T] and prefix [P, W], on the CPU.

        Raises:
            InputError: An LLM cannot be found, or is not the one of the training.
        """
        device, states = str(self._execution_device), {}
        for name, entry in self.encoders.items():
            if self._offloads:
                entry.encoder(device).to(device)
            states[name] = entry.collate(entry.encode(prompts, device))
            if self._offloads:
                entry.encoder().to("cpu")
        return states

    def enable_model_cpu_offload(self, gpu_id: int | None = None, device: torch.device | str | None = None) -> None:
        """Keep one part at a time on the GPU, the others in the machine's memory: each LLM while it reads the prompts,
        then the network for all steps, then the codec. The images stay the same.

        Args:
            gpu_id: Number of the GPU.
            device: The device, instead.
        """
        super().enable_model_cpu_offload(gpu_id, device)
        self._move_parts("cpu")

    @property
    def _offloads(self) -> bool:
        return bool(getattr(self, "_all_hooks", None))

    def change_sampler(self, changes: SamplerChanges) -> None:
        """Sample with other settings from now on; a saved model keeps its own.

        Args:
            changes: The settings that change.
        """
        # Not by assignment, with which diffusers changes the configuration that a save writes, too.
        self.__dict__["sampler"] = changes.applied(self.sampler)

    def latent_shape(self, height: int | None = None, width: int | None = None) -> tuple[int, int, int]:
        """The latents of an image.

        Args:
            height: Pixels, a multiple of codec factor x patch size. Default: the training size.
            width: The same.

        Returns:
            Channels, height and width of the latents.

        Raises:
            InputError: A size this model cannot draw.
        """
        height = self.config.height if height is None else height
        width = self.config.width if width is None else width
        step = self.codec.factor * self.model.config.patch_size
        if height < 1 or width < 1 or height % step or width % step:
            raise InputError(f"{height} x {width} pixels: height and width must be multiples of {step} for this model")
        return self.model.config.channels, height // self.codec.factor, width // self.codec.factor

    def unload_encoders(self) -> None:
        """Forget the LLMs; they come back with the next prompt given as text."""
        for entry in self.encoders.values():
            entry.loaded = None

    # Eleven parameters: the names and the flat, keyword-only form that callers of diffusers pipelines expect.
    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        states: Mapping[str, TextStates] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        guidance_interval: tuple[float, float] | None = None,
        guidance_rescale: float | None = None,
        scheduler: str | None = None,
        seed: int | Sequence[int] | None = None,
        output_type: Literal["pil", "np", "pt", "latent"] = "pil",
    ) -> Any:
        """Sample images of the prompts, one each, in their order.

        Args:
            prompt: One or B captions, each encoded once however often it is given.
            states: In place of prompts, encoder name -> states of B captions, from `encode_prompts` or a corpus.
            height: Pixels, a multiple of codec factor x patch size. Default: the training size.
            width: The same.
            num_inference_steps: Sampling steps. Default, here and below: the model's own settings.
            guidance_scale: Weight of the prompt against the empty caption; 1 is no guidance.
            guidance_interval: Timesteps (low, high) in [0, 1] between which guidance acts.
            guidance_rescale: Share in [0, 1] by which guided predictions get back their standard deviation.
            scheduler: Name of the sampler's method, "auto" for the objective's first.
            seed: One for all prompts, or one per prompt: an image depends on its prompt and seed, not on the batch.
                None draws seeds at random.
            output_type: "pil" gives a list of images; "np" uint8 [B, height, width, 3]; "pt" float32
                [B, 3, height, width] in [0, 1]; "latent" the latents [B, C, H, W], not decoded.

        Returns:
            Images in the form that `output_type` names.

        Raises:
            InputError: A wrong size, a missing encoder, states of another instruction, a scheduler that does not fit,
                a prompt that is no text, a seed of more than 64 bits, or a number of seeds that is neither one nor
                that of the prompts.
        """
        # 1. Refuse what cannot work before the LLMs are loaded.
        prompts = listed_prompts(prompt, states)
        shape = self.latent_shape(height, width)
        changes = {
            "steps": num_inference_steps,
            "guidance_scale": guidance_scale,
            "guidance_interval": guidance_interval,
            "guidance_rescale": guidance_rescale,
            "scheduler": scheduler,
        }
        sampler = self._sampler_with(changes)
        seeds = seed_per_image(seed, image_count(prompts, states))
        # 2. States of the prompts, each distinct prompt once; `rows` says which states each image has.
        states, rows = self._states_of(prompts, states)
        # 3. The prompts' and the empty prompt's states, which guidance contrasts, on the network's device.
        text, empty = self._conditions(states)
        # 4. Walk from seeded noise to latents.
        predict = GuidedPredictor(self.model, text, empty, sampler, rows)
        latents = self._denoise(predict, sampler, seeds, shape)
        # 5. Decode.
        return latents if output_type == "latent" else self._decode(latents, output_type)

    def _sampler_with(self, changes: dict[str, Any]) -> SamplerSettings:
        """The model's sampler with these `SamplerChanges`; raises InputError where they do not fit the objective."""
        sampler = validate(SamplerChanges, changes, "sampling").applied(self.sampler)
        self.objective.scheduler(sampler)
        return sampler

    def _states_of(
        self, prompts: list[str] | None, states: Mapping[str, TextStates] | None
    ) -> tuple[Mapping[str, TextStates], list[int]]:
        """States of R captions per encoder, and each image's caption among them: as given, or of the prompts."""
        if prompts is None:
            assert states is not None
            return states, list(range(image_count(None, states)))
        row_of = {text: row for row, text in enumerate(dict.fromkeys(prompts))}
        return self.encode_prompts(list(row_of)), [row_of[text] for text in prompts]

    def _conditions(self, states: Mapping[str, TextStates]) -> tuple[dict[str, TextStates], dict[str, TextStates]]:
        """The captions' states and one empty caption's; raises InputError for states that are not this model's."""
        device = self._execution_device
        text = {name: entry.to(device) for name, entry in states.items()}
        self.model.conditioner.check(text)
        for name, entry in self.encoders.items():
            entry.require_instruction(text[name].prefix)
        return text, {name: entry.collate([entry.empty]).to(device) for name, entry in self.encoders.items()}

    def _denoise(
        self, predict: GuidedPredictor, sampler: SamplerSettings, seeds: Sequence[int], shape: tuple[int, int, int]
    ) -> torch.Tensor:
        """Latents [B, C, H, W] of one image per seed."""
        generators = seeded_generators(seeds)
        noise = initial_noise(generators, shape, self._execution_device)
        with self.progress_bar(total=sampler.steps) as bar:
            latents = sample(predict, self.objective, noise, sampler, generators, lambda _step, _latents: bar.update())
        self.maybe_free_model_hooks()
        return latents

    def _decode(self, latents: torch.Tensor, output_type: str) -> Any:
        """Images in the form that was asked for; the codec leaves the GPU again where parts are offloaded."""
        images = self.codec.decode(latents)
        if self._offloads:
            self.codec.to("cpu")
        return _as_images(images, output_type)


def _replace_encoder(entry: ModelEncoder, replacement: str | Path | PromptEncoder) -> None:
    """Share a loaded LLM, or say where else the LLM's files are: a folder, or a hub id as `id@commit`."""
    if isinstance(replacement, PromptEncoder):
        entry.share(replacement)
    else:
        place, _, commit = str(replacement).partition("@")
        entry.settings = entry.settings.model_copy(update={"model": place, "revision": commit or None})


def _local_folder(folder: str | Path, revision: str | None) -> Path:
    path = Path(folder).expanduser()
    if path.exists() or not is_hub_id(str(folder)):
        if not path.is_dir():
            raise InputError(f"{folder}: no such model folder; give one that lidit train wrote, or a hub id")
        return path
    return fetch_snapshot(str(folder), revision, ["*.json", "*.safetensors", "README.md"])


def _as_images(images: torch.Tensor, output_type: str) -> Any:
    """Images [B, 3, height, width] in [0, 1] in the form that was asked for."""
    images = images.float().clamp(0, 1).cpu()
    if output_type == "pt":
        return images
    array = unit_to_bytes(images.permute(0, 2, 3, 1)).numpy()  # [B, height, width, 3]
    return array if output_type == "np" else [Image.fromarray(np.ascontiguousarray(image)) for image in array]
