"""One training step and one sampling step of LI-DiT against diffusers' PixArtTransformer2DModel, in
the same run.

    python -m benchmarks.model --quick         two CPU cores, some minutes
    python -m benchmarks.model --device cuda   the 1B shape, bfloat16, both models compiled by block

Both models have the same depth, width, heads, patch size and latents, and see the same number of
text tokens: LI-DiT refines the states of two LLMs into them (instruction tokens on top), PixArt
projects ready states of the same width. LI-DiT's step includes its conditioner. A sampling step is
one of classifier-free guidance as either library takes it: images of as many prompts, and images of
one prompt. Steps alternate between the two; every ratio is PixArt's time over ours, the median over
rounds; on the CPU, processor time is compared, and the allocator keeps what it has: giving memory
back to the kernel and asking for it again costs up to a fifth of a step, and chance decides whose.

FLOPs per image: `lidit.models.flops.forward_flops`, x 3 for a training step. MFU = FLOPs / time /
the device's dense bfloat16 peak. The last line printed is one JSON object.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from diffusers import PixArtTransformer2DModel
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lidit.config import ModelSettings, SamplerSettings
from lidit.diffusion import GuidedPredictor
from lidit.models import LIDiT, TextStates
from lidit.models.compiled import compile_blocks
from lidit.models.flops import forward_flops
from pipelines.training.mfu import peak_flops

LLMS = ("first", "second")


@dataclass(frozen=True)
class Shape:
    """What both models are built from. `caption` and `prefix` are tokens of each of two LLMs
    `encoder_width` wide.
    """

    width: int
    depth: int
    heads: int
    patch: int
    channels: int
    latent: int
    caption: int
    prefix: int
    encoder_width: int
    batch: int
    sampling_batch: int
    rounds: int


# the 1B shape, a sixth as wide
QUICK = Shape(192, 28, 4, 2, 4, 32, 64, 32, 576, batch=8, sampling_batch=4, rounds=9)
BILLION = Shape(1152, 28, 16, 2, 16, 32, 64, 32, 4096, batch=64, sampling_batch=16, rounds=15)


def build_lidit(shape: Shape, device: torch.device, dtype: torch.dtype) -> LIDiT:
    """LI-DiT of `shape` for two LLMs, random on `device`, its gates open."""
    settings = ModelSettings(
        width=shape.width, depth=shape.depth, heads=shape.heads, patch_size=shape.patch
    )
    with device:
        model = LIDiT.from_settings(
            settings, dict.fromkeys(LLMS, shape.encoder_width), shape.channels
        ).to(dtype)
    open_gates(model)
    return model


@torch.no_grad()
def open_gates(model: nn.Module) -> None:
    """Noise on all weights: gates that start at zero would let a kernel see only zeros."""
    for parameter in model.parameters():
        parameter.add_(0.02 * torch.randn_like(parameter))


def lidit_inputs(
    shape: Shape, lengths: torch.Tensor, tokens: int, device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    """Random latents, noise, timesteps and text states. `lengths` [2, B], each LLM's, padded to
    `tokens`.
    """
    batch = lengths.shape[1]
    with device:
        latents = torch.randn(batch, shape.channels, shape.latent, shape.latent, dtype=dtype)
        masks = torch.arange(tokens) < lengths.to(device)[..., None]
        states = torch.randn(2, batch, tokens, shape.encoder_width, dtype=dtype)
        prefix = torch.randn(shape.prefix, shape.encoder_width, dtype=dtype)
        t = torch.rand(batch)
    text = {name: TextStates(states[i], masks[i], prefix) for i, name in enumerate(LLMS)}
    return {"latents": latents, "noise": torch.randn_like(latents), "t": t, "text": text}


class Bench:
    """Both models, their inputs and their optimizers on one device."""

    def __init__(
        self, shape: Shape, device: torch.device, dtype: torch.dtype, compiled: bool
    ) -> None:
        torch.manual_seed(0)
        self.shape, self.device, self.dtype = shape, device, dtype
        self.lidit = build_lidit(shape, device, dtype)
        with device:
            self.pixart = PixArtTransformer2DModel(
                num_attention_heads=shape.heads, attention_head_dim=shape.width // shape.heads,
                in_channels=shape.channels, out_channels=shape.channels, num_layers=shape.depth,
                cross_attention_dim=shape.width, sample_size=shape.latent, patch_size=shape.patch,
                caption_channels=shape.encoder_width, use_additional_conditions=False,
            ).to(dtype)  # fmt: skip
        open_gates(self.pixart)
        if compiled:
            compile_blocks(self.lidit, dynamic=False)
            for block in self.pixart.transformer_blocks:
                block.compile(dynamic=False)
        self.optimizers = {
            "lidit": torch.optim.AdamW(self.lidit.parameters(), lr=1e-6, fused=True),
            "pixart": torch.optim.AdamW(self.pixart.parameters(), lr=1e-6, fused=True),
        }
        self.training, self.sampling = self._inputs(shape.batch), self._inputs(shape.sampling_batch)
        self.sampling["t"].fill_(0.5)  # all images of a sampling step are at the same one
        sampler, text = SamplerSettings(guidance_scale=4), self.sampling["text"]
        one = {
            name: TextStates(entry.states[:1], entry.mask[:1], entry.prefix)
            for name, entry in text.items()
        }
        empty = {
            name: TextStates.collate([entry.states[0, :0]], entry.prefix)
            for name, entry in text.items()
        }
        self.prompts = GuidedPredictor(self.lidit, text, empty, sampler)
        self.one_prompt = GuidedPredictor(
            self.lidit, one, empty, sampler, [0] * shape.sampling_batch
        )

    def _inputs(self, batch: int) -> dict[str, Any]:
        shape = self.shape
        # Captions differ in length, so both models have to mask; half to all of the tokens are
        # real.
        lengths = torch.randint(shape.caption // 2, shape.caption + 1, (2, batch))
        lengths[:, 0] = shape.caption
        inputs = lidit_inputs(shape, lengths, shape.caption, self.device, self.dtype)
        entries = list(inputs["text"].values())
        inputs["states"] = torch.cat([entry.states for entry in entries], dim=1)
        inputs["mask"] = torch.cat([entry.mask for entry in entries], dim=1).to(self.dtype)
        return inputs

    def predict(self, which: str, batch: dict[str, Any]) -> torch.Tensor:
        if which == "lidit":
            return self.lidit(batch["latents"], batch["t"], batch["text"])
        return self.pixart(
            batch["latents"],
            encoder_hidden_states=batch["states"],
            timestep=batch["t"] * 1000,
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
            encoder_attention_mask=batch["mask"],
            return_dict=False,
        )[0]

    def train_step(self, which: str) -> None:
        batch = self.training
        loss = (self.predict(which, batch).float() - batch["noise"].float()).square().mean()
        loss.backward()
        self.optimizers[which].step()
        self.optimizers[which].zero_grad(set_to_none=True)

    @torch.no_grad()
    def arithmetic(self, which: str) -> int:
        """FLOPs of one prediction outside attention, as torch counts them in the matrix products of
        either model.
        """
        with torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False) as counter:
            self.predict(which, self.training)
        return counter.get_total_flops()

    @torch.no_grad()
    def sample_step(self, which: str, guided: GuidedPredictor) -> None:
        """One guided prediction. PixArt's pipeline repeats prompts and the empty caption, padded
        alike, per image.
        """
        batch = self.sampling
        if which == "lidit":
            guided(batch["latents"], batch["t"])
        else:
            repeated = {
                name: torch.cat([batch[name]] * 2) for name in ("latents", "t", "states", "mask")
            }
            unconditional, conditional = self.predict(which, repeated).float().chunk(2)
            unconditional + 4 * (conditional - unconditional)

    def conditioner_step(self) -> None:
        """Forward and backward of the conditioner alone: its part of a training step."""
        batch = self.training
        condition = self.lidit.conditioner(batch["text"], batch["t"])
        (
            condition.tokens.float().square().mean() + condition.pooled.float().square().mean()
        ).backward()
        self.lidit.zero_grad(set_to_none=True)

    def seconds(self, step: Callable[[], None]) -> float:
        """Wall time on a GPU; on the CPU processor time, which other processes on the machine do
        not stretch.
        """
        if self.device.type == "cpu":
            began = time.process_time()
            step()
            return time.process_time() - began
        torch.cuda.synchronize()
        began = time.perf_counter()
        step()
        torch.cuda.synchronize()
        return time.perf_counter() - began


def compare(bench: Bench, step: Callable[[str], None]) -> dict[str, float]:
    """Alternating rounds of `step`, the order swapped each time; ratio > 1 means
    LI-DiT is faster.
    """
    for which in ("lidit", "pixart"):
        for _ in range(3 if bench.device.type == "cuda" else 1):
            step(which)
    times: dict[str, list[float]] = {"lidit": [], "pixart": []}
    for number in range(bench.shape.rounds):
        for which in ("lidit", "pixart") if number % 2 else ("pixart", "lidit"):
            times[which].append(bench.seconds(lambda which=which: step(which)))
    ratios = sorted(
        theirs / ours for theirs, ours in zip(times["pixart"], times["lidit"], strict=True)
    )
    return {
        "ratio": statistics.median(ratios),
        "ratio_low": ratios[len(ratios) // 4],
        "ratio_high": ratios[-1 - len(ratios) // 4],
        "lidit_seconds": statistics.median(times["lidit"]),
        "pixart_seconds": statistics.median(times["pixart"]),
    }


def run(shape: Shape, device: torch.device, dtype: torch.dtype, compiled: bool) -> dict[str, Any]:
    bench = Bench(shape, device, dtype, compiled)
    tokens = dict.fromkeys(LLMS, shape.caption), dict.fromkeys(LLMS, shape.prefix)
    flops = forward_flops(bench.lidit, (shape.latent, shape.latent), *tokens)
    print(f"training steps, batch {shape.batch} ...", flush=True)
    train = compare(bench, bench.train_step)
    print(f"  {train}", flush=True)
    bench.conditioner_step()
    bench.conditioner_step()
    alone = statistics.median(bench.seconds(bench.conditioner_step) for _ in range(shape.rounds))
    gc.collect()
    print(f"sampling steps, {shape.sampling_batch} images with guidance ...", flush=True)
    drawn = compare(bench, lambda which: bench.sample_step(which, bench.prompts))
    print(f"  {drawn}", flush=True)
    same = compare(bench, lambda which: bench.sample_step(which, bench.one_prompt))
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    peak = peak_flops(name)
    rate = 3 * sum(flops.values()) * shape.batch / train["lidit_seconds"]
    result: dict[str, Any] = {
        "benchmark": "model",
        "peer": "diffusers.PixArtTransformer2DModel",
        "device": name,
        "dtype": str(dtype).removeprefix("torch."),
        "compiled": compiled,
        "torch": torch.__version__,
        "shape": asdict(shape),
        "parameters": {"lidit": _count(bench.lidit), "pixart": _count(bench.pixart)},
        "ratio_train_step": round(train["ratio"], 3),
        "ratio_sample_step": round(drawn["ratio"], 3),
        "ratio_sample_step_one_prompt": round(same["ratio"], 3),
        "arithmetic_over_pixart": round(bench.arithmetic("lidit") / bench.arithmetic("pixart"), 3),
        "conditioner_share": round(alone / train["lidit_seconds"], 4),
        "conditioner_flops_share": round(flops["conditioner"] / sum(flops.values()), 4),
        "images_per_second": round(shape.batch / train["lidit_seconds"], 2),
        "teraflops": round(rate / 1e12, 2),
        "mfu": None if peak is None else round(rate / peak, 4),
        "train": train,
        "sample": drawn,
        "sample_one_prompt": same,
    }
    if device.type == "cuda":
        result["peak_memory_gigabytes"] = round(torch.cuda.max_memory_allocated() / 1e9, 1)
    return result


def keep_memory() -> None:
    """glibc: neither maps big blocks one by one nor gives the heap's end back.
    Elsewhere, nothing.
    """
    if hasattr(libc := ctypes.CDLL(None), "mallopt"):
        trim_threshold, mmap_max = -1, -4  # malloc.h
        libc.mallopt(trim_threshold, -1)
        libc.mallopt(mmap_max, 0)


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="small shape on the CPU, ends within five minutes"
    )
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--batch", type=int, help="images in a training step")
    parser.add_argument("--eager", action="store_true", help="do not compile on the GPU")
    arguments = parser.parse_args()
    keep_memory()
    cuda = arguments.device == "cuda"
    if cuda:
        torch.set_float32_matmul_precision("high")
    shape = BILLION if cuda and not arguments.quick else QUICK
    if arguments.batch:
        shape = Shape(**{**asdict(shape), "batch": arguments.batch})
    dtype = torch.bfloat16 if cuda else torch.float32
    print(
        json.dumps(run(shape, torch.device(arguments.device), dtype, cuda and not arguments.eager))
    )


if __name__ == "__main__":
    main()
