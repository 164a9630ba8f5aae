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
from lidit.config.fields import check_prompts, check_seeds
from lidit.config.settings import validate
from lidit.diffusion import GuidedPredictor, build_objective, initial_noise, sample, seeded_generators
from lidit.errors import InputError, one_line
from lidit.hub import fetch_snapshot, is_hub_id
from lidit.models import LIDiT, TextStates
from lidit.pipeline.card import model_card
from lidit.pipeline.model_encoder import ModelEncoder
from lidit.text import PromptEncoder

ENCODERS, VAE = "encoders", "vae"
INDEX = "model_index.json"


class LIDiTPipeline(DiffusionPipeline):
    """Draws images of prompts. Load with `from_pretrained`; call with prompts, or with states computed before.

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
    ) -> Self:
        """Load a model folder that `lidit train` wrote. No LLM is loaded before a prompt needs it.

        Args:
            folder: The model folder, or a hub id.
            revision: Commit of a hub id.
            dtype: Of the weights; None keeps them as saved.
            encoders: Encoder name -> an encoder that is already loaded, to share it; or the folder where its files are
                on this machine; or a hub id as `id@commit`.

        Returns:
            The pipeline, on the CPU; `to("cuda")` moves it.

        Raises:
            InputError: The folder is no model folder, an encoder's files are missing, or a shared encoder is not the
                one of the training.
        """
        path = _local_folder(folder, revision)
        if not (path / INDEX).is_file():
            raise InputError(f"{path}: no {INDEX}, so this is not a model folder written by lidit train")
        try:
            model = LIDiT.load(path / "model", dtype)
            # Without the flag a folder that has only a pickle is opened as one, and a pickle can run code.
            pipeline = super().from_pretrained(str(path), model=model, torch_dtype=dtype, use_safetensors=True)
        except (OSError, ValueError) as error:
            reason = one_line(error, 300)
            raise InputError(f"{path}: the model cannot be loaded ({reason}); fetch or train it again") from None
        pipeline.model.eval()
        if pipeline.codec_settings.model == VAE:
            pipeline.codec_settings = pipeline.codec_settings.model_copy(update={"model": str(path / VAE)})
        names = pipeline.model.conditioner.names
        pipeline.encoders = {name: ModelEncoder.load(path / ENCODERS, name) for name in names}
        for name, replacement in (encoders or {}).items():
            if name not in pipeline.encoders:
                raise InputError(f"the model has no encoder {name!r}; it was trained with {', '.join(names)}")
            entry = pipeline.encoders[name]
            if isinstance(replacement, PromptEncoder):
                entry.share(replacement)
            else:
                place, _, commit = str(replacement).partition("@")
                entry.settings = entry.settings.model_copy(update={"model": place, "revision": commit or None})
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
        """What diffusers does not know of: LLMs and codec, where they are loaded."""
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
        device, found = str(self._execution_device), {}
        for name, entry in self.encoders.items():
            if self._offloads:
                entry.encoder(device).to(device)
            found[name] = entry.collate(entry.encode(prompts, device))
            if self._offloads:
                entry.encoder().to("cpu")
        return found

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
        self.sampler = changes.applied(self.sampler)

    def unload_encoders(self) -> None:
        """Forget the LLMs; they come back with the next prompt given as text."""
        for entry in self.encoders.values():
            entry.loaded = None

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
        """Images of the prompts, one each, in their order.

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
        if (prompt is None) == (states is None):
            raise InputError("give either prompt or states")
        # What can be wrong is looked at before the LLMs are loaded.
        height = self.config.height if height is None else height
        shape = self._latent_shape(height, self.config.width if width is None else width)
        given = {
            "steps": num_inference_steps,
            "guidance_scale": guidance_scale,
            "guidance_interval": guidance_interval,
            "guidance_rescale": guidance_rescale,
            "scheduler": scheduler,
        }
        sampler = validate(SamplerChanges, given, "sampling").applied(self.sampler)
        self.objective.scheduler(sampler)
        if prompt is not None:
            prompts = [prompt] if isinstance(prompt, str) else list(prompt)
            if not prompts:
                raise InputError("give at least one prompt")
            check_prompts(prompts, "the pipeline")
            seeds = _seeds(seed, len(prompts))
            row_of = {text: row for row, text in enumerate(dict.fromkeys(prompts))}
            states, rows = self.encode_prompts(list(row_of)), [row_of[text] for text in prompts]
        else:
            assert states is not None
            rows = list(range(len(next(iter(states.values())).states)))
            seeds = _seeds(seed, len(rows))
        device = self._execution_device
        text = {name: entry.to(device) for name, entry in states.items()}
        self.model.conditioner.check(text)
        for name, entry in self.encoders.items():
            entry.require_instruction(text[name].prefix)
        empty = {name: entry.collate([entry.empty]).to(device) for name, entry in self.encoders.items()}
        generators = seeded_generators(seeds)
        predict = GuidedPredictor(self.model, text, empty, sampler, rows)
        with self.progress_bar(total=sampler.steps) as bar:
            latents = sample(
                predict,
                self.objective,
                initial_noise(generators, shape, device),
                sampler,
                generators,
                lambda _step, _latents: bar.update(),
            )
        self.maybe_free_model_hooks()
        if output_type == "latent":
            return latents
        images = self.codec.decode(latents)
        if self._offloads:
            self.codec.to("cpu")
        return _as_images(images, output_type)

    def _latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        step = self.codec.factor * self.model.config.patch_size
        if height < 1 or width < 1 or height % step or width % step:
            raise InputError(f"{height} x {width} pixels: height and width must be multiples of {step} for this model")
        return self.model.config.channels, height // self.codec.factor, width // self.codec.factor


def save_pipeline(
    folder: str | Path,
    model: LIDiT,
    encoders: Sequence[ModelEncoder],
    objective: ObjectiveSettings,
    sampler: SamplerSettings,
    codec: CodecSettings,
    size: tuple[int, int],
    facts: Mapping[str, Any],
) -> LIDiTPipeline:
    """Write the folder that `LIDiTPipeline.from_pretrained` reads, with a model card.

    Args:
        encoders: one for each of the model's, see `ModelEncoder.of_family`.
        size: training size in pixels (height, width). facts: what the card says of the run ("scores" as a table).
    Raises:
        InputError: one of the model's encoders is missing.
    """
    named = {encoder.name: encoder for encoder in encoders}
    missing = [name for name in model.conditioner.names if name not in named]
    if missing:
        raise InputError(f"{folder}: no text family for the model's encoder {', '.join(missing)}")
    pipeline = LIDiTPipeline(
        model,
        objective=objective.model_dump(mode="json"),
        sampler=sampler.model_dump(mode="json"),
        codec=codec.model_dump(mode="json"),
        height=size[0],
        width=size[1],
    )
    pipeline.encoders = {name: named[name] for name in model.conditioner.names}
    pipeline.save_pretrained(folder)
    card = model_card(model, list(pipeline.encoders.values()), objective, sampler, codec, size, facts)
    (Path(folder) / "README.md").write_text(card, encoding="utf-8")
    return pipeline


def _local_folder(folder: str | Path, revision: str | None) -> Path:
    path = Path(folder).expanduser()
    if path.exists() or not is_hub_id(str(folder)):
        if not path.is_dir():
            raise InputError(f"{folder}: no such model folder; give one that lidit train wrote, or a hub id")
        return path
    return fetch_snapshot(str(folder), revision, ["*.json", "*.safetensors", "README.md"])


def _seeds(seed: int | Sequence[int] | None, count: int) -> list[int]:
    if seed is None:
        return [int(value) for value in torch.randint(0, 2**31, (count,))]
    seeds = [seed] * count if isinstance(seed, (int, np.integer)) else list(seed)
    if len(seeds) != count:
        raise InputError(f"{len(seeds)} seeds for {count} prompts: give one, or one per prompt")
    check_seeds(seeds, "the pipeline")
    return [int(value) for value in seeds]


def _as_images(images: torch.Tensor, output_type: str) -> Any:
    """Images [B, 3, height, width] in [0, 1] in the form that was asked for."""
    images = images.float().clamp(0, 1).cpu()
    if output_type == "pt":
        return images
    array = images.permute(0, 2, 3, 1).mul(255).round().to(torch.uint8).numpy()  # [B, height, width, 3]
    return array if output_type == "np" else [Image.fromarray(np.ascontiguousarray(image)) for image in array]
