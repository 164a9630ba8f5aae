"""Training an AutoencoderKL: the model, its loss, what its latents' scale is, and how well it
reconstructs.

Legend: B batch, C latent channels, H and W pixels, h and w latent positions.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import nn

from lidit.config.codec import CodecLossSettings, CodecModelSettings
from lidit.errors import InputError, one_line
from lidit.pixels import to_levels

LOG_VARIANCE = (-30.0, 20.0)  # as diffusers clamps it
# What vision networks were trained on: ImageNet's mean and deviation of each channel.
_MEAN, _DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class TrainableAutoencoder(nn.Module):
    """Encode, sample and decode in one forward pass, as DeepSpeed wants it."""

    def __init__(self, settings: CodecModelSettings) -> None:
        super().__init__()
        blocks = len(settings.block_out_channels)
        self.autoencoder = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * blocks,
            up_block_types=("UpDecoderBlock2D",) * blocks,
            block_out_channels=settings.block_out_channels,
            layers_per_block=settings.layers_per_block,
            latent_channels=settings.latent_channels,
            norm_num_groups=settings.norm_groups,
            mid_block_add_attention=settings.middle_attention,
            scaling_factor=1.0,
            shift_factor=0.0,
            use_quant_conv=False,
            use_post_quant_conv=False,
        )

    def forward(
        self, pixels: torch.Tensor, noise: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """pixels [B, 3, H, W] on [-1, 1], noise [B, C, h, w] -> reconstruction, mean and log
        variance [B, C, h, w].
        """
        mean, log_variance = self.autoencoder.encoder(pixels).chunk(2, dim=1)
        log_variance = log_variance.clamp(*LOG_VARIANCE)
        latents = mean + torch.exp(0.5 * log_variance) * noise
        return self.autoencoder.decoder(latents), mean, log_variance


class ReconstructionLoss:
    """L1 per pixel value, KL to a standard normal per latent value, and a perceptual term where
    there is a network.
    """

    def __init__(self, settings: CodecLossSettings, device: torch.device) -> None:
        self.settings = settings
        self.perceptual = (
            PerceptualDistance(settings, device) if settings.perceptual_model else None
        )

    def __call__(
        self, pixels: torch.Tensor, outputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    ) -> torch.Tensor:
        """pixels [B, 3, H, W] and what TrainableAutoencoder made of them -> float32 scalar."""
        reconstruction, mean, log_variance = (tensor.float() for tensor in outputs)
        loss = (reconstruction - pixels).abs().mean()
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        loss = loss + self.settings.kl_weight * divergence
        if self.perceptual:
            loss = loss + self.settings.perceptual_weight * self.perceptual(reconstruction, pixels)
        return loss


class PerceptualDistance:
    """Mean squared difference of a frozen network's hidden states, each position's channels made
    unit length.

    LPIPS without its learned weights, over any vision network of transformers that gives hidden
    states.
    """

    def __init__(self, settings: CodecLossSettings, device: torch.device) -> None:
        from transformers import AutoModel

        name = str(settings.perceptual_model)
        try:
            self.network: Any = AutoModel.from_pretrained(
                name,
                revision=settings.perceptual_revision or "main",
                use_safetensors=True,
                trust_remote_code=False,
            )
        except (OSError, ValueError) as error:
            raise InputError(
                f"loss.perceptual_model: {name} cannot be loaded ({one_line(error, 200)})"
            ) from None
        self.network.eval().requires_grad_(False).to(device)
        self.mean = torch.tensor(_MEAN, device=device).view(1, 3, 1, 1)
        self.deviation = torch.tensor(_DEVIATION, device=device).view(1, 3, 1, 1)

    def __call__(self, one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """[B, 3, H, W] on [-1, 1] twice -> scalar."""
        pairs = zip(self._features(one), self._features(other), strict=True)
        return torch.stack([(a - b).square().sum(1).mean() for a, b in pairs]).mean()

    def _features(self, pixels: torch.Tensor) -> list[torch.Tensor]:
        normalised = ((pixels + 1) / 2 - self.mean) / self.deviation
        states = self.network(pixel_values=normalised, output_hidden_states=True).hidden_states
        # [B, channels, h, w] of convolutions; [B, tokens, channels] of transformers
        channels_first = [state if state.ndim == 4 else state.transpose(1, 2) for state in states]
        return [nn.functional.normalize(state.float(), dim=1) for state in channels_first]


@torch.no_grad()
def measure_scale(
    model: AutoencoderKL, batches: Iterable[torch.Tensor], seed: int = 0
) -> tuple[float, float]:
    """Shift and scaling factor with which sampled latents have mean 0 and deviation 1 over all
    their values.
    """
    generator = torch.Generator().manual_seed(seed)
    total = squares = 0.0
    count = 0
    for pixels in batches:
        posterior = model.encode(pixels.to(model.device, model.dtype)).latent_dist
        mean, deviation = posterior.mean.double().cpu(), posterior.std.double().cpu()
        latents = mean + deviation * torch.randn(
            mean.shape, generator=generator, dtype=torch.float64
        )
        total, squares, count = (
            total + latents.sum().item(),
            squares + latents.square().sum().item(),
            count + latents.numel(),
        )
    shift = total / count
    return shift, 1 / (squares / count - shift**2) ** 0.5


@torch.no_grad()
def reconstruct(model: AutoencoderKL, pixels: torch.Tensor) -> torch.Tensor:
    """[B, 3, H, W] on [-1, 1] -> the decoded posterior means on [-1, 1], float32."""
    latents = model.encode(pixels.to(model.device, model.dtype)).latent_dist.mode()
    decoded: torch.Tensor = model.decode(latents).sample
    return decoded.float().clamp(-1, 1)


def psnr(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio of each image in decibels, [B]; both [B, 3, H, W] on [-1, 1], seen
    as 8 bits.
    """
    bits = [to_levels(image) for image in (one, other)]
    error = (bits[0] - bits[1]).square().mean(dim=(1, 2, 3))
    return 10 * torch.log10(255.0**2 / error.clamp_min(1e-2))
