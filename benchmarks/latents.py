"""Images to latents: does the pipeline keep the codec busy, and what does the plain loop reach?

    python benchmarks/latents.py [--quick] [--gpus 1] [--codec FOLDER]

The same JPEG files in WebDataset tars, the same codec. Peer "plain": one process that decodes with
PIL, resizes to one square size and encodes image by image. Peer "ready": the codec alone on tensors
that are ready, in our batches: the rate no pipeline can beat. `codec_busy` is the share of the
actor's time inside the codec while the job runs. Without
--codec a random AutoencoderKL is used: 8x, 16 channels, narrow enough for a CPU (on a GPU the width
of SD's). The last line printed is one JSON object.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lidit.codecs import load_codec
from lidit.codecs.encoding import BATCH_PIXELS
from lidit.config import CodecSettings, IngestSettings, PoolSettings
from pipelines.corpus.ingest import run_ingest
from pipelines.corpus.latents import run_latents

PER_TAR = 128


def write_images(folder: Path, count: int, side: int) -> None:
    """JPEGs of photographic size and detail: twice the training side, several aspect ratios."""
    source = np.random.default_rng(0)
    shapes = [(2 * side, 2 * side), (2 * side, 3 * side), (3 * side, 2 * side)]
    for first in range(0, count, PER_TAR):
        with tarfile.open(folder / f"{first // PER_TAR:05d}.tar", "w") as archive:
            for number in range(first, min(first + PER_TAR, count)):
                height, width = shapes[number % len(shapes)]
                small = Image.fromarray(
                    source.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
                )
                buffer = io.BytesIO()
                small.resize((width, height), Image.Resampling.BICUBIC).save(
                    buffer, "JPEG", quality=90
                )
                for name, content in (
                    (f"{number:06d}.jpg", buffer.getvalue()),
                    (f"{number:06d}.txt", b"an image"),
                ):
                    info = tarfile.TarInfo(name)
                    info.size = len(content)
                    archive.addfile(info, io.BytesIO(content))


def random_codec(folder: Path, widths: tuple[int, ...]) -> Path:
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    model = AutoencoderKL(
        block_out_channels=widths,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=16,
        norm_num_groups=8,
    )
    model.save_pretrained(str(folder), safe_serialization=True)
    return folder


def plain_loop(tars: Path, settings: CodecSettings, device: str, side: int) -> float:
    """Images per second of the loop everyone writes first."""
    codec = load_codec(settings, device)
    started, images = time.perf_counter(), 0
    for path in sorted(tars.glob("*.tar")):
        with tarfile.open(path) as archive:
            for member in archive:
                if not member.name.endswith(".jpg"):
                    continue
                content = archive.extractfile(member)
                assert content is not None
                image = (
                    Image.open(content)
                    .convert("RGB")
                    .resize((side, side), Image.Resampling.LANCZOS)
                )
                pixels = (
                    torch.from_numpy(np.asarray(image).copy()).to(device).permute(2, 0, 1).float()
                    / 127.5
                    - 1
                )
                codec.encode(pixels[None]).mean.cpu()
                images += 1
    return images / (time.perf_counter() - started)


def ready_rate(settings: CodecSettings, device: str, side: int, batches: int) -> float:
    """Images per second of the codec on tensors that are ready."""
    codec = load_codec(settings, device)
    size = max(1, BATCH_PIXELS[device] // side**2)
    pixels = torch.rand(size, 3, side, side, device=device) * 2 - 1
    codec.encode(pixels).mean.cpu()
    started = time.perf_counter()
    for _ in range(batches):
        codec.encode(pixels).mean.cpu()
    return size * batches / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="fewer images; ends within 5 minutes on 2 cores"
    )
    parser.add_argument("--gpus", type=float, default=0)
    parser.add_argument("--codec", help="folder of a diffusers autoencoder")
    parser.add_argument("--images", type=int)
    arguments = parser.parse_args()
    device = "cuda" if arguments.gpus else "cpu"
    side = 256 if arguments.gpus else 128
    count = arguments.images or {("cpu", True): 256, ("cpu", False): 1024}.get(
        (device, arguments.quick), 8192
    )
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="latents-benchmark-") as name:
        work = Path(name)
        (work / "tars").mkdir()
        write_images(work / "tars", count, side)
        widths = (128, 256, 512, 512) if arguments.gpus else (16, 32, 64, 64)
        codec = arguments.codec or str(random_codec(work / "codec", widths))
        settings = CodecSettings(name="codec", model=codec)
        ingest = IngestSettings(resolution=side, bucket_multiple=16)
        began = time.perf_counter()
        run_ingest([str(work / "tars")], str(work / "corpus"), ingest)
        ingested = count / (time.perf_counter() - began)
        print(f"  ingest (every image decoded and checked) {ingested:8.1f} images/s")
        pool = PoolSettings(gpus=arguments.gpus)
        summary = run_latents(str(work / "corpus"), settings, pool)
        plain = plain_loop(work / "tars", settings, device, side)
        print(f"  plain loop                               {plain:8.1f} images/s")
        ready = ready_rate(settings, device, side, 16 if arguments.quick else 64)
        print(f"  codec on ready tensors                   {ready:8.1f} images/s")
        ours = summary.images / summary.encode_seconds
        print(
            f"  latents, without start-up                {ours:8.1f} images/s, codec busy "
            f"{summary.codec_busy:.1%}"
        )
        result: dict[str, Any] = {
            "benchmark": "latents",
            "quick": arguments.quick,
            "device": torch.cuda.get_device_name() if arguments.gpus else f"{os.cpu_count()} cores",
            "images": count,
            "side": side,
            "codec_busy": round(summary.codec_busy, 3),
            "images_per_second": round(ours, 1),
            "ratio_plain": round(ours / plain, 2),
            "ratio_ready": round(ours / ready, 2),
            "ingest_images_per_second": round(ingested, 1),
        }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
