"""Part 7: an autoencoder of 16 channels: images encoded per second by memory format, and the memory
of decoding.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import AutoencoderKL

from benchmarks.gpu import timing
from benchmarks.gpu.run import Run
from lidit.codecs import AutoencoderCodec


def build(run: Run) -> AutoencoderCodec:
    """The shape of Stable Diffusion 3's autoencoder, random."""
    channels = (8, 8) if run.toy else (128, 256, 512, 512)
    with run.device:
        model = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * len(channels),
            up_block_types=("UpDecoderBlock2D",) * len(channels),
            block_out_channels=channels, layers_per_block=1 if run.toy else 2, latent_channels=16,
            norm_num_groups=4 if run.toy else 32, use_quant_conv=False, use_post_quant_conv=False,
        )  # fmt: skip
    return AutoencoderCodec(
        model.to(torch.bfloat16 if run.cuda else torch.float32), True, "float32"
    )


@contextmanager
def searching(enabled: bool) -> Iterator[None]:
    """Whether cuDNN tries its convolutions and keeps the fastest."""
    before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, enabled
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def part_7(run: Run) -> None:
    codec = build(run)
    run.attempt("encode", lambda: encode(run, codec), needs=2)
    codec.model.to(memory_format=torch.channels_last)
    run.attempt("encode, channels last", lambda: encode(run, codec), needs=2)
    with searching(True):
        run.attempt("encode, channels last, benchmark", lambda: encode(run, codec), needs=4)
    for count in (1, 4, 16):
        run.attempt(f"decode {count} of 1024", lambda: decode(run, codec, count), needs=3)  # noqa: B023


def encode(run: Run, codec: AutoencoderCodec) -> dict[str, Any]:
    """Images of 256 pixels per second."""
    count, side = (1, 16) if run.toy else (32, 256)
    pixels = torch.rand(count, 3, side, side, device=run.device) * 2 - 1
    if codec.model.encoder.conv_in.weight.is_contiguous(memory_format=torch.channels_last):
        pixels = pixels.contiguous(memory_format=torch.channels_last)
    rate = count / timing.median(run, lambda: codec.encode(pixels), 1 if run.toy else 5)
    run.headline(f"{rate:.0f} images/s")
    return {"images_per_second": round(rate, 1)}


def decode(run: Run, codec: AutoencoderCodec, count: int) -> dict[str, Any]:
    """Images of 1024 pixels per second, `count` at once, and what that takes beside the weights."""
    side = 4 if run.toy else 128
    latents = torch.randn(min(count, 2) if run.toy else count, 16, side, side, device=run.device)
    if run.cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if run.cuda else 0
    seconds = timing.median(run, lambda: codec.decode(latents), 1 if run.toy else 2, warm=1)
    peak = torch.cuda.max_memory_allocated() - before if run.cuda else 0
    run.headline(f"{count} of 1024: {peak / 1e9:.1f} GB")
    return {
        "images_per_second": round(len(latents) / seconds, 2),
        "gigabytes": round(peak / 1e9, 2),
    }
