"""What a pipeline is made of, under the names that diffusers gives the parts: network, LLMs, codec,
scheduler.

    FOLDER/model_index.json   class, objective, sampler and codec settings, training size
           model/             LIDiT: config.json + safetensors
           vae/               the autoencoder, unless latents are pixels
           encoders/NAME.*    one LLM each: its identity, its prefix and empty states of training
           pipeline.py        what diffusers runs for `custom_pipeline`
           README.md          model card

Shapes: B batch, T caption tokens, P prefix tokens, W width of an LLM.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
from diffusers import DiffusionPipeline
from torch import nn
from transformers import PreTrainedTokenizerBase

from lidit.codecs import AutoencoderCodec, Codec, load_codec
from lidit.config import CodecSettings, ObjectiveSettings, SamplerChanges, SamplerSettings
from lidit.config.json_object import read_object
from lidit.config.settings import validate
from lidit.diffusion import build_objective, check_scheduler
from lidit.errors import InputError
from lidit.models import LIDiT, LIDiTTransformer, TextStates
from lidit.pipeline.adapters import PipelineAdapters
from lidit.pipeline.checksums import check_model
from lidit.pipeline.model_encoder import ModelEncoder

ENCODERS, VAE = "encoders", "vae"
INDEX = "model_index.json"


def _settings_beside(model: LIDiT) -> dict[str, Any]:
    """What the model folder of a network says of its pipeline: `LIDiTPipeline(**pipe.components)`
    has the network alone, and would draw with another objective.
    """
    place = model.config.get("_name_or_path")
    index = Path(place).parent / INDEX if place else None
    if index is None or not index.is_file():
        return {}
    return read_object(index, "copy the model folder again")


class PipelineParts(PipelineAdapters, DiffusionPipeline):
    """The parts of a pipeline, where they are and what is loaded of them; `LIDiTPipeline` draws
    with them.
    """

    model: LIDiT
    model_cpu_offload_seq = "model"

    def __init__(
        self,
        model: LIDiT,
        objective: dict[str, Any] | None = None,
        sampler: dict[str, Any] | None = None,
        codec: dict[str, Any] | None = None,
        height: int | None = None,
        width: int | None = None,
    ) -> None:
        super().__init__()
        beside = _settings_beside(model)
        objective, sampler, codec = (
            beside.get(name) if given is None else given
            for name, given in (("objective", objective), ("sampler", sampler), ("codec", codec))
        )
        height, width = height or beside.get("height", 256), width or beside.get("width", 256)
        self.register_modules(model=model)
        self.register_to_config(
            objective=objective, sampler=sampler, codec=codec, height=height, width=width
        )
        self.objective = build_objective(
            validate(ObjectiveSettings, objective or {}, f"{INDEX}: objective")
        )
        self.sampler = validate(SamplerSettings, sampler or {}, f"{INDEX}: sampler")
        self.codec_settings = validate(CodecSettings, codec or {}, f"{INDEX}: codec")
        self._encoders: dict[str, ModelEncoder] | None = None
        self._codec: Codec | None = None
        self._scheduler: Any | None = None

    # ---------------------------------------------------------------------------------------------
    # The LLMs

    @property
    def encoders(self) -> dict[str, ModelEncoder]:
        """Name -> what training read of an LLM, and the LLM once a prompt needed it."""
        if self._encoders is None:
            self._encoders = self._read_encoders()
        return self._encoders

    @encoders.setter
    def encoders(self, encoders: dict[str, ModelEncoder]) -> None:
        self._encoders = encoders

    def _read_encoders(self) -> dict[str, ModelEncoder]:
        """Those of the folder the network came from: all that is left to know where diffusers made
        the pipeline.
        """
        folder = self._folder
        if folder is None:
            return {}
        if not (folder / ENCODERS).is_dir():
            raise InputError(
                f"{folder}: the encoders' files are not beside the model; load it with "
                "LIDiTPipeline.from_pretrained"
            )
        check_model(folder)
        return {
            name: ModelEncoder.load(folder / ENCODERS, name)
            for name in self.model.conditioner.names
        }

    @property
    def _folder(self) -> Path | None:
        """The model folder; None for a network that was loaded from none."""
        place = self.model.config.get("_name_or_path")
        return Path(place).parent if place else None

    @property
    def text_encoders(self) -> dict[str, nn.Module]:
        """Name -> the LLM as a torch module; loads those that are not in memory."""
        return {
            name: entry.encoder(str(self._execution_device)).trunk.model
            for name, entry in self.encoders.items()
        }

    @property
    def tokenizers(self) -> dict[str, PreTrainedTokenizerBase]:
        """Name -> the LLM's tokenizer; loads the LLM with it."""
        loaded = {
            name: entry.encoder(str(self._execution_device))
            for name, entry in self.encoders.items()
        }
        return {name: encoder.tokenizer.tokenizer for name, encoder in loaded.items()}

    def encode_prompts(self, prompts: Sequence[str]) -> dict[str, TextStates]:
        """Encode prompts with all of the model's LLMs: the values that a corpus would hold for
        these captions.

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

    def unload_encoders(self) -> None:
        """Forget the LLMs; they come back with the next prompt given as text."""
        for entry in self.encoders.values():
            entry.loaded = None

    # ---------------------------------------------------------------------------------------------
    # Network, codec and scheduler

    @property
    def transformer(self) -> LIDiTTransformer:
        """The diffusion transformer; `model` is it with the conditioner before it."""
        return self.model.transformer

    @property
    def codec(self) -> Codec:
        """The codec, loaded when the first latents are decoded."""
        if self._codec is None:
            self._codec = load_codec(self.found_codec, str(self._execution_device))
            if self._offloads:
                self._codec.to("cpu")
        return self._codec

    @property
    def found_codec(self) -> CodecSettings:
        """The codec's settings, with the place of an autoencoder that lies in the model folder."""
        settings, folder = self.codec_settings, self._folder
        if settings.model != VAE or folder is None:
            return settings
        return settings.model_copy(update={"model": str(folder / VAE)})

    @property
    def vae(self) -> nn.Module | None:
        """The codec's autoencoder; None where latents are pixels."""
        codec = self.codec
        autoencoder: nn.Module | None = codec.model if isinstance(codec, AutoencoderCodec) else None
        return autoencoder

    def enable_vae_slicing(self) -> None:
        """Decode one image at a time, to save memory; nothing to do where latents are pixels."""
        self._switch_vae("enable_slicing")

    def disable_vae_slicing(self) -> None:
        """Decode all images of a call at once again."""
        self._switch_vae("disable_slicing")

    def enable_vae_tiling(self) -> None:
        """Decode large images in overlapping tiles, to save memory; their seams are blended, so
        pixels may differ.
        """
        self._switch_vae("enable_tiling")

    def disable_vae_tiling(self) -> None:
        """Decode large images in one piece again."""
        self._switch_vae("disable_tiling")

    def _switch_vae(self, method: str) -> None:
        if (vae := self.vae) is None:
            return
        if not hasattr(vae, method):
            raise InputError(
                f"{type(vae).__name__} has no {method}; this codec decodes images in one way only"
            )
        getattr(vae, method)()

    @property
    def scheduler(self) -> Any:
        """The scheduler of diffusers that calls use. Assign another to swap it, None for the
        model's own again.

        Any that walks the model's path fits: `OtherScheduler.from_config(pipe.scheduler.config)`.
        Every call takes a copy, and a saved model keeps its own.
        """
        return (
            self.objective.scheduler(self.sampler) if self._scheduler is None else self._scheduler
        )

    @scheduler.setter
    def scheduler(self, scheduler: Any | None) -> None:
        if scheduler is not None:
            check_scheduler(self.objective, scheduler)
        self._scheduler = scheduler

    def change_sampler(self, changes: SamplerChanges) -> None:
        """Sample with other settings from now on; a saved model keeps its own.

        Args:
            changes: The settings that change.
        """
        # Not by assignment, with which diffusers changes the configuration that a save writes, too.
        self.__dict__["sampler"] = changes.applied(self.sampler)

    def latent_shape(
        self, height: int | None = None, width: int | None = None
    ) -> tuple[int, int, int]:
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
            raise InputError(
                f"{height} x {width} pixels: height and width must be multiples of {step} "
                "for this model"
            )
        return self.model.config.channels, height // self.codec.factor, width // self.codec.factor

    # ---------------------------------------------------------------------------------------------
    # Where the parts are

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

    def enable_model_cpu_offload(
        self, gpu_id: int | None = None, device: torch.device | str | None = None
    ) -> None:
        """Keep one part at a time on the GPU, the others in the machine's memory: each LLM while it
        reads the prompts, then the network for all steps, then the codec. The images stay the same.

        Args:
            gpu_id: Number of the GPU.
            device: The device, instead.
        """
        super().enable_model_cpu_offload(gpu_id, device)
        self._move_parts("cpu")

    def _move_parts(self, device: torch.device | str) -> None:
        """Move the loaded LLMs and codec, which diffusers does not know of."""
        for entry in (self._encoders or {}).values():
            if entry.loaded is not None:
                entry.loaded.to(str(device))
        if self._codec is not None:
            self._codec.to(device)

    @property
    def _offloads(self) -> bool:
        return bool(getattr(self, "_all_hooks", None))
