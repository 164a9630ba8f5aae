"""Training a codec, the arithmetic: loss against diffusers' own distribution, scale, PSNR, a
perceptual network.
"""

from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from transformers import ResNetConfig, ResNetModel, ViTConfig, ViTModel

from lidit.codecs.autoencoder import (
    ReconstructionLoss,
    TrainableAutoencoder,
    measure_scale,
    psnr,
    reconstruct,
)
from lidit.config.codec import CodecLossSettings, CodecModelSettings
from lidit.errors import InputError

SETTINGS = CodecModelSettings(
    block_out_channels=(8, 16, 16),
    layers_per_block=1,
    latent_channels=5,
    norm_groups=4,
    middle_attention=False,
)
PIXELS = torch.rand(3, 3, 16, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1
CPU = torch.device("cpu")


def model(settings: CodecModelSettings = SETTINGS) -> TrainableAutoencoder:
    torch.manual_seed(1)
    return TrainableAutoencoder(settings)


def test_forward_and_loss_are_those_of_diffusers() -> None:
    trainee = model()
    noise = torch.randn(3, 5, 4, 6, generator=torch.Generator().manual_seed(2))
    outputs = trainee(PIXELS, noise)
    posterior = trainee.autoencoder.encode(PIXELS).latent_dist
    decoded = trainee.autoencoder.decode(posterior.mean + posterior.std * noise).sample
    assert torch.allclose(outputs[0], decoded, atol=1e-5)
    # diffusers sums KL over an image's latent values; ours is the mean of them
    expected = (decoded - PIXELS).abs().mean() + 0.3 * posterior.kl().mean() / noise[0].numel()
    assert torch.allclose(
        ReconstructionLoss(CodecLossSettings(kl_weight=0.3), CPU)(PIXELS, outputs), expected
    )


def test_default_shape_is_the_papers() -> None:
    settings = CodecModelSettings()
    with torch.device("meta"):
        autoencoder = TrainableAutoencoder(settings).autoencoder
        latents = autoencoder.encode(torch.zeros(1, 3, 64, 64)).latent_dist.mean
    assert (settings.factor, latents.shape) == (8, (1, 16, 8, 8))


def test_scale_makes_sampled_latents_standard() -> None:
    autoencoder = model().autoencoder.eval()
    batches = [
        torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(i)) * 2 - 1
        for i in range(4)
    ]
    shift, scaling = measure_scale(autoencoder, batches)
    with torch.no_grad():
        posterior = autoencoder.encode(torch.cat(batches)).latent_dist
    latents = (posterior.sample(torch.Generator().manual_seed(9)) - shift) * scaling
    assert abs(latents.mean().item()) < 0.03
    assert abs(latents.std().item() - 1) < 0.03


def test_psnr_is_the_definition() -> None:
    one = torch.zeros(2, 3, 4, 4)
    other = one.clone()
    other[1] += 10 / 127.5
    worse, better = psnr(one, other)[1].item(), psnr(one, other)[0].item()
    assert worse == pytest.approx(20 * torch.log10(torch.tensor(255.0 / 10)).item(), abs=1e-3)
    assert better > 60
    assert reconstruct(model().autoencoder, PIXELS).shape == PIXELS.shape


@pytest.mark.parametrize("kind", ["convolutions", "tokens"])
def test_a_perceptual_network_pulls_towards_the_image(tmp_path: Path, kind: str) -> None:
    torch.manual_seed(0)
    if kind == "convolutions":
        network = ResNetModel(
            ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
        )
    else:
        network = ViTModel(
            ViTConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                      intermediate_size=32, image_size=16,
                      patch_size=4)
        )  # fmt: skip
    network.save_pretrained(tmp_path)
    settings = CodecLossSettings(kl_weight=0, perceptual_weight=0.5, perceptual_model=str(tmp_path))
    loss = ReconstructionLoss(settings, CPU)
    plain = ReconstructionLoss(CodecLossSettings(kl_weight=0), CPU)
    square = PIXELS[..., :16]
    posterior = (torch.zeros(3, 5, 4, 4), torch.zeros(3, 5, 4, 4))
    assert loss(square, (square, *posterior)).item() == pytest.approx(0, abs=1e-6)
    blurred = torch.nn.functional.avg_pool2d(square, 3, 1, 1).requires_grad_()
    extra = loss(square, (blurred, *posterior)) - plain(square, (blurred, *posterior))
    assert extra > 0.001
    extra.backward()
    closer = blurred.detach() - 0.5 * blurred.grad / blurred.grad.abs().max()
    assert loss.perceptual
    assert loss.perceptual(closer, square) < loss.perceptual(blurred.detach(), square)
    assert not any(parameter.grad is not None for parameter in loss.perceptual.network.parameters())


def test_mistakes_in_settings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="6 does not divide the 8 channels"):
        CodecModelSettings(block_out_channels=(8,), norm_groups=6)
    with pytest.raises(ValidationError, match="give both or neither"):
        CodecLossSettings(perceptual_weight=1.0)
    with pytest.raises(InputError, match=r"perceptual_model.*cannot be loaded"):
        ReconstructionLoss(
            CodecLossSettings(perceptual_weight=1.0, perceptual_model=str(tmp_path / "absent")), CPU
        )
