"""A model in fewer bits, or compiled, against itself in float32, in the same run: score, pixels,
bytes and processor time.

    python -m benchmarks.precision demo/runs/demo/model
    PYTHONPATH=torchao-site python -m benchmarks.precision MODEL --only float32 int8-weights int8

Pictures: one per prompt of the scene benchmark, the prompts and seeds of `lidit evaluate`, drawn as
the folder says from states that its LLMs encoded once. Variants: `bfloat16`; `int8-weights` and
`int8` (torchao: linear layers in 8 bits, and inputs too, scaled for each token); `compiled` (the
repeated blocks). What a machine lacks is left out and named. For each:

- `ratio_images_per_second`: over float32; variants in turns batch by batch, one thread, the median
  of processor times, after one batch that is not counted.
- `score`, and `difference` less float32's, paired by picture, with 95 % intervals.
- `pixels`: mean absolute difference to float32's pictures, in 255ths; `mebibytes` of the network's
  files.

The last line printed is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import TorchAoConfig

from benchmarks.distill import BATCH, Model, draw_all, overall
from lidit.config import EvaluateSettings
from lidit.datasets.scenes.benchmark import benchmark_prompts
from lidit.models.compiled import compile_blocks
from lidit.pipeline import LIDiTPipeline
from pipelines.evaluation.models import weights_digest


def in_float32(folder: Path) -> LIDiTPipeline:
    return LIDiTPipeline.from_pretrained(folder, dtype=torch.float32)


def in_bfloat16(folder: Path) -> LIDiTPipeline:
    return LIDiTPipeline.from_pretrained(folder, dtype=torch.bfloat16)


def in_eight_bits(folder: Path, torchao_config: str) -> LIDiTPipeline:
    import torchao.quantization

    config = TorchAoConfig(getattr(torchao.quantization, torchao_config)())
    return LIDiTPipeline.from_pretrained(folder, dtype=torch.float32, quantization_config=config)


def compiled(folder: Path) -> LIDiTPipeline:
    pipe = in_float32(folder)
    compile_blocks(pipe.model)
    return pipe


VARIANTS: dict[str, Callable[[Path], LIDiTPipeline]] = {
    "float32": in_float32,
    "bfloat16": in_bfloat16,
    "int8-weights": partial(in_eight_bits, torchao_config="Int8WeightOnlyConfig"),
    "int8": partial(in_eight_bits, torchao_config="Int8DynamicActivationInt8WeightConfig"),
    "compiled": compiled,
}


def mebibytes(pipe: LIDiTPipeline) -> float:
    """Of the network as it would be saved."""
    with tempfile.TemporaryDirectory() as folder:
        pipe.model.save_pretrained(folder)
        return sum(path.stat().st_size for path in Path(folder).glob("*.safetensors")) / 2**20


def compared(variant: Model, exact: Model, items: list[dict[str, Any]]) -> dict[str, Any]:
    paired = [mine - its for mine, its in zip(variant.strict, exact.strict, strict=True)]
    ratios = [its / mine for mine, its in zip(variant.seconds[1:], exact.seconds[1:], strict=True)]
    pixels = np.abs(np.stack(variant.images).astype(float) - np.stack(exact.images)).mean()
    return {
        "score": asdict(overall(variant.strict, items)),
        "difference": asdict(overall(paired, items)),
        "pixels": round(float(pixels), 3),
        "mebibytes": round(mebibytes(variant.pipe), 1),
        "ratio_images_per_second": round(statistics.median(ratios), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="model folder")
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--per-tag", type=int, default=24, help="prompts per category")
    parser.add_argument("--layout", default="simple")
    parser.add_argument("--quick", action="store_true", help="fewer prompts: within 5 minutes")
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    names = [name for name in VARIANTS if name in {"float32", *arguments.only}]
    missing = [] if find_spec("torchao") else [name for name in names if name.startswith("int8")]
    if missing:
        print(f"left out for want of torchao: {', '.join(missing)}")
    models = {
        name: Model(arguments.model, VARIANTS[name](arguments.model))
        for name in names
        if name not in missing
    }
    for model in models.values():
        model.pipe.set_progress_bar_config(disable=True)
    settings = EvaluateSettings(
        per_tag=16 if arguments.quick else arguments.per_tag, layout=arguments.layout
    )
    exact = models["float32"]
    items = benchmark_prompts(
        exact.pipe.config.height, settings.layout, settings.seed, settings.per_tag
    )
    draw_all(list(models.values()), items, settings)
    rows = {name: compared(model, exact, items) for name, model in models.items()}
    facts = {
        "prompts": len(items),
        "weights": weights_digest(arguments.model)[:12],
        "images_per_processor_second": round(BATCH / statistics.median(exact.seconds[1:]), 1),
        "left_out": missing,
        "torch": torch.__version__,
    }
    for name, row in rows.items():
        print(f"{name:13} {json.dumps(row)}")
    print(json.dumps({"benchmark": "precision", **facts, "variants": rows}))


if __name__ == "__main__":
    main()
