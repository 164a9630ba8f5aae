"""Image <-> latents: diffusers autoencoders with their own scaling, and `pixels`, the identity.

Legend: B batch, C latent channels, H and W pixels, h and w = H / factor and W / factor.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from lidit.config import CodecSettings
from lidit.errors import InputError, one_line
from lidit.hub import fetch_snapshot, is_hub_id
from lidit.pixels import to_unit
from lidit.store import digest_of

CODEC_VERSION = 1  # raise when the same settings and files begin to give other latents
CLASSES = ("AutoencoderKL", "AutoencoderTiny", "AutoencoderDC")


@dataclass(frozen=True)
class Encoded:
    """mean, deviation [B, C, h, w] float32, scaled and shifted as the diffusion model sees them.

    deviation is None for codecs without a posterior.
    """

    mean: torch.Tensor
    deviation: torch.Tensor | None = None


class Codec(Protocol):
    """factor: pixels per latent position; channels: C; storage: dtype on disk."""

    factor: int
    channels: int
    storage: str

    def encode(self, pixels: torch.Tensor) -> Encoded:
        """[B, 3, H, W] on [-1, 1] -> latents; H and W are multiples of `factor`."""

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """[B, C, h, w] -> [B, 3, H, W] float32 on [0, 1], on the latents' device."""

    def to(self, device: str | torch.device) -> None:
        """Moves its weights, where it has any; `decode` brings them to the latents."""


# A decoder's activations take 1.9 GB per million pixels: of one megapixel each, as many as fill a
# GPU's kernels.
DECODED_PIXELS = 4 * 2**20


class PixelCodec:
    """Latents are the pixels on [-1, 1]; stored as the 8 bits they came from."""

    factor, channels, storage = 1, 3, "uint8"

    def encode(self, pixels: torch.Tensor) -> Encoded:
        return Encoded(pixels.float())

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return to_unit(latents)

    def to(self, device: str | torch.device) -> None:
        pass


class AutoencoderCodec:
    """A diffusers autoencoder; latents = (z - shift) x scaling, its own factors."""

    def __init__(self, model: Any, posterior: bool, storage: str) -> None:
        self.model, self.posterior, self.storage = (
            model.eval().requires_grad_(False),
            posterior,
            storage,
        )
        self.factor, self.channels, self.scaling, self.shift = _shape(
            type(model).__name__, dict(model.config)
        )

    @torch.inference_mode()
    def encode(self, pixels: torch.Tensor) -> Encoded:
        found = self.model.encode(pixels.to(self._device, self._dtype))
        distribution = getattr(found, "latent_dist", None)
        if distribution is None:
            latents = found.latents if hasattr(found, "latents") else found.latent
            return Encoded((latents.float() - self.shift) * self.scaling)
        mean = (distribution.mean.float() - self.shift) * self.scaling
        return Encoded(mean, distribution.std.float() * self.scaling if self.posterior else None)

    @torch.inference_mode()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        if latents.device != self._device:
            self.to(latents.device)
        unscaled = (latents.float() / self.scaling + self.shift).to(self._dtype)
        at_once = max(1, DECODED_PIXELS // (self.factor**2 * latents.shape[-1] * latents.shape[-2]))
        return torch.cat(
            [to_unit(self.model.decode(part).sample) for part in unscaled.split(at_once)]
        )

    def to(self, device: str | torch.device) -> None:
        self.model.to(device)

    @property
    def _device(self) -> torch.device:
        return torch.device(next(self.model.parameters()).device)

    @property
    def _dtype(self) -> torch.dtype:
        dtype: torch.dtype = next(self.model.parameters()).dtype
        return dtype


def codec_spec(settings: CodecSettings, device: str = "cpu") -> dict[str, Any]:
    """Everything that determines the latents, as `family.json` stores it. Reads the codec's files,
    loads no weights.

    Raises InputError where there is no such codec.
    """
    common = {"code": CODEC_VERSION, "fit": "lanczos, cover, centre crop", "scale": settings.scale}
    if settings.model is None:
        return {
            **common,
            "codec": "pixels",
            "factor": 1,
            "channels": 3,
            "storage": "uint8",
            "posterior": False,
        }
    folder, config = _model_folder(settings)
    name = config["_class_name"]
    factor, channels, scaling, shift = _shape(name, config)
    weights = sorted(folder.glob("*.safetensors"))
    return {
        **common,
        "codec": name,
        "factor": factor,
        "channels": channels,
        "scaling_factor": scaling,
        "shift_factor": shift,
        "dtype": _dtype_name(settings, device),
        "storage": settings.storage,
        "posterior": settings.posterior == "sample" and name == "AutoencoderKL",
        "config_sha256": digest_of(
            {key: value for key, value in config.items() if not key.startswith("_")}
        ),
        "weights_sha256": digest_of({file.name: _sha256(file) for file in weights}),
    }


def load_codec(settings: CodecSettings, device: str = "cpu") -> Codec:
    """The codec, ready on `device`. Raises InputError where there is no such codec."""
    if settings.model is None:
        return PixelCodec()
    import diffusers

    folder, config = _model_folder(settings)
    dtype = getattr(torch, _dtype_name(settings, device))
    name = config["_class_name"]
    try:
        model = getattr(diffusers, name).from_pretrained(
            str(folder), torch_dtype=dtype, use_safetensors=True, local_files_only=True
        )
    except (OSError, ValueError) as error:
        raise InputError(f"{folder}: the codec cannot be loaded: {one_line(error, 300)}") from None
    return AutoencoderCodec(
        model.to(device),
        settings.posterior == "sample" and name == "AutoencoderKL",
        settings.storage,
    )


def _dtype_name(settings: CodecSettings, device: str) -> str:
    if settings.dtype != "auto":
        return settings.dtype
    return "bfloat16" if device.startswith("cuda") else "float32"


def _model_folder(settings: CodecSettings) -> tuple[Path, dict[str, Any]]:
    """The folder with the autoencoder's config and weights: the model itself, or `vae` of a whole
    pipeline.
    """
    model = str(settings.model)
    folder = Path(model).expanduser()
    if not folder.is_dir():
        folder = _download(model, settings.revision)
    if not (folder / "config.json").is_file() and (folder / "vae" / "config.json").is_file():
        folder = folder / "vae"
    try:
        config: dict[str, Any] = json.loads((folder / "config.json").read_text("utf-8"))
    except FileNotFoundError:
        raise InputError(
            f"{folder}: no config.json: not a folder of a diffusers autoencoder"
        ) from None
    except ValueError:
        raise InputError(f"{folder}/config.json: not valid JSON") from None
    if config.get("_class_name") not in CLASSES:
        raise InputError(
            f"{folder}: a {config.get('_class_name')} is no codec; codecs are {', '.join(CLASSES)}"
        )
    if not list(folder.glob("*.safetensors")):
        raise InputError(
            f"{folder}: no *.safetensors file; other weight formats can run code and are not read"
        )
    return folder.resolve(), config


def _download(model: str, revision: str | None) -> Path:
    if not is_hub_id(model):
        raise InputError(
            f"{model}: no such folder; give a folder, `pixels`, or a hub id with a revision"
        )
    if revision is None:
        raise InputError(
            f"{model}: neither a folder here nor a pinned hub id: set codec.revision to the commit"
        )
    patterns = [
        f"{place}{name}" for place in ("", "vae/") for name in ("config.json", "*.safetensors")
    ]
    return fetch_snapshot(model, revision, patterns)


def _shape(name: str, config: dict[str, Any]) -> tuple[int, int, float, float]:
    """factor, channels, scaling factor and shift factor as each class defines them."""
    if config.get("latents_mean") is not None:
        raise InputError(
            f"{name}: latents_mean and latents_std per channel are not supported; "
            "use a codec with one shift and one scaling factor"
        )
    if name == "AutoencoderDC":
        blocks = config["encoder_block_out_channels"]
        return (
            2 ** (len(blocks) - 1),
            int(config["latent_channels"]),
            float(config.get("scaling_factor") or 1.0),
            0.0,
        )
    if name == "AutoencoderTiny":
        factor = 2 ** (len(config["encoder_block_out_channels"]) - 1)
        shift = float(config.get("shift_factor") or 0.0)
        return (
            factor,
            int(config["latent_channels"]),
            float(config.get("scaling_factor") or 1.0),
            shift,
        )
    factor = 2 ** (len(config["block_out_channels"]) - 1)
    shift = float(config.get("shift_factor") or 0.0)
    return factor, int(config["latent_channels"]), float(config.get("scaling_factor") or 1.0), shift


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
