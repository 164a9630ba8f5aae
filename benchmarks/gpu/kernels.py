"""Part 0: the card itself, which attention kernel each shape takes and which would be best, and the
ceilings of matrix products and copies.

Legend: B batch, H heads, L queries, S keys, E head width; a matrix product is [M, K] x [K, N].
"""

from __future__ import annotations

import shutil
import subprocess
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu import timing
from benchmarks.gpu.run import Run
from lidit.models.layers import attend

BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
}


@dataclass(frozen=True)
class Attention:
    """An attention of the model or of an LLM: L queries meet S keys; `mask`: none, of the keys, or
    the square.
    """

    name: str
    batch: int
    heads: int
    queries: int
    keys: int
    width: int
    mask: str
    trains: bool = True

    def tensors(self, run: Run, dtype: torch.dtype) -> dict[str, Any]:
        """Queries, keys, values in the model's layout [B, L, H, E] (values cut out of a wider
        projection), and mask.
        """
        batch, heads, width = (1, 2, 8) if run.toy else (self.batch, self.heads, self.width)
        queries, keys = (8, 12) if run.toy else (self.queries, self.keys)
        with run.device:
            query = torch.randn(
                batch, queries, heads, width, dtype=dtype, requires_grad=self.trains
            )
            key = torch.randn(batch, keys, heads, width, dtype=dtype, requires_grad=self.trains)
            wide = torch.randn(
                batch, keys, 3 * heads * width, dtype=dtype, requires_grad=self.trains
            )
            lengths = torch.randint(keys // 2, keys + 1, (batch,))
            valid = torch.arange(keys) < lengths[:, None]  # [B, S]
        mask = None if self.mask == "none" else valid[:, None, None, :]
        if self.mask == "square":
            mask = mask.expand(batch, 1, queries, keys).contiguous()
        return {
            "query": query,
            "key": key,
            "value": wide.chunk(3, -1)[2].unflatten(-1, (heads, width)),
            "mask": mask,
        }


SHAPES = (
    Attention("self", 64, 16, 256, 256, 72, "none"),
    Attention("cross", 64, 16, 256, 128, 72, "keys"),
    Attention("refiner", 64, 16, 96, 96, 72, "keys"),
    Attention("embed", 32, 32, 32, 150, 128, "square", trains=False),
)


def dtype_of(run: Run) -> torch.dtype:
    return torch.bfloat16 if run.cuda else torch.float32


def part_0(run: Run) -> None:
    run.attempt("device", lambda: facts(run))
    run.attempt("driver", driver)
    run.attempt("products", lambda: products(run), needs=2)
    run.attempt("bandwidth", lambda: bandwidth(run), needs=1)
    for shape in SHAPES:
        run.attempt(f"attention {shape.name}", lambda shape=shape: attention(run, shape), needs=2)


def facts(run: Run) -> dict[str, Any]:
    """What the box is: two figures of two cards are never compared unawares."""
    found: dict[str, Any] = {
        "torch": torch.__version__,
        "gcc": shutil.which("gcc") is not None,
        "python_headers": (Path(sysconfig.get_paths()["include"]) / "Python.h").is_file(),
    }
    if run.cuda:
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "device": torch.cuda.get_device_name(),
            "gigabytes": round(properties.total_memory / 1e9, 1),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "cudnn_attention": torch.backends.cuda.cudnn_sdp_enabled(),
        }
        run.headline(found["device"])
    return found


def driver() -> dict[str, Any]:
    """What nvidia-smi says of driver, clocks and power."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return {"nvidia_smi": None}
    query = "driver_version,clocks.sm,clocks.max.sm,power.limit,temperature.gpu"
    answer = subprocess.run(
        [tool, f"--query-gpu={query}", "--format=csv"], capture_output=True, text=True, timeout=5
    )
    return {"nvidia_smi": answer.stdout.splitlines()}


def products(run: Run) -> dict[str, Any]:
    """TFLOP/s of a linear layer's three products: forward, by its input, by its weight."""
    rows = (32,) if run.toy else (16_384, 65_536)
    layers = ((16, 16),) if run.toy else ((1152, 1152), (1152, 3456), (1152, 4608), (4608, 1152))
    found: dict[str, Any] = {}
    for m in rows:
        for k, n in layers:
            with run.device:
                x, weight = (
                    torch.randn(m, k, dtype=dtype_of(run)),
                    torch.randn(n, k, dtype=dtype_of(run)),
                )
                bias, grad = (
                    torch.randn(n, dtype=dtype_of(run)),
                    torch.randn(m, n, dtype=dtype_of(run)),
                )
            seconds = {
                "forward": timing.each(run, lambda: F.linear(x, weight, bias)),  # noqa: B023 - called at once
                "by_input": timing.each(run, lambda: grad @ weight),  # noqa: B023
                "by_weight": timing.each(run, lambda: grad.t() @ x),  # noqa: B023
            }
            found[f"{m}x{k}x{n}"] = {
                name: round(2e-12 * m * k * n / spent, 1) for name, spent in seconds.items()
            }
    best = max(rate for rates in found.values() for rate in rates.values())
    run.headline(f"matrix products up to {best:.0f} TFLOP/s")
    return {"teraflops": found}


def bandwidth(run: Run) -> dict[str, Any]:
    """GB/s of a copy on the device, read and written bytes together."""
    with run.device:
        source = torch.zeros((1 << 20) if run.toy else (1 << 30), dtype=torch.uint8)
    target = torch.empty_like(source)
    seconds = timing.each(run, lambda: target.copy_(source))
    run.headline(f"copies {2e-12 * len(source) / seconds:.2f} TB/s")
    return {"gigabytes_per_second": round(2e-9 * len(source) / seconds)}


def attention(run: Run, shape: Attention) -> dict[str, Any]:
    """Kernels that torch takes by itself, and milliseconds by every kernel that can be forced."""
    tensors = shape.tensors(run, dtype_of(run))

    def forward() -> torch.Tensor:
        return attend(**tensors)

    def both() -> None:
        forward().float().square().mean().backward()

    whole = both if shape.trains else forward
    whole()
    chosen = timing.kernels(run, whole)["top"]
    found: dict[str, Any] = {
        "shape": [shape.batch, shape.heads, shape.queries, shape.keys, shape.width],
        "mask": shape.mask,
        "kernels": [entry["name"] for entry in chosen if timing.kind(entry["name"]) == "attention"],
        "default": _milliseconds(run, forward, whole),
    }
    for name, backend in BACKENDS.items() if run.cuda else ():
        try:
            with sdpa_kernel([backend]):
                found[name] = _milliseconds(run, forward, whole)
        except RuntimeError as error:  # no such kernel for this shape
            found[name] = " ".join(str(error).split())[:80]
    run.headline(f"{shape.name}: {', '.join(found['kernels'])[:60]}")
    return found


def _milliseconds(run: Run, forward: Any, whole: Any) -> dict[str, float]:
    return {
        "forward": round(1e3 * timing.each(run, forward), 4),
        "whole": round(1e3 * timing.each(run, whole), 4),
    }
