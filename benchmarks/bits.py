"""What fewer bits cost on real LLM states: error at 8, 6 and 4 bits, with one scale per token or one per 64 channels.

    python -m benchmarks.bits --quick [--model package:smollm2]

States are standardised per channel with the statistics of other captions than are measured; the error is in those
deviations. The peer is bfloat16, what caches keep. The last line printed is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from typing import Any

import torch

from lidit.config import EncoderSettings
from lidit.store import channel_statistics, text_table
from lidit.store.states import decode_table
from lidit.text import PromptEncoder, resolve_encoder


def fewer_bits(model: str, count: int) -> dict[str, Any]:
    """Error of 8, 6 and 4 bits on real states, in deviations: `count` captions, calibrated on as many others."""
    encoder = PromptEncoder.load(resolve_encoder(EncoderSettings(name="bits", model=model), "cpu"), "cpu")
    nouns, colours = ("cat", "clock", "bicycle", "teapot", "lighthouse"), ("red", "pale blue", "striped", "wooden")
    texts = [f"a {c} {n} beside a {d} {m} at {t}" for n in nouns for m in nouns for c in colours for d in colours
             for t in ("noon", "the harbour in the rain")]  # fmt: skip
    random.Random(0).shuffle(texts)
    calibration = [e.states.float() for e in encoder.encode(texts[:count])]
    measured = torch.cat([e.states.float() for e in encoder.encode(texts[count : 2 * count])])
    mean, deviation = channel_statistics(calibration)
    width = measured.shape[1]
    exact = (measured - mean) / deviation
    rounded = ((measured.bfloat16().float() - measured) / deviation).square().mean().sqrt().item()
    found: dict[str, Any] = {"bfloat16": {"error": round(rounded, 4), "bytes_per_token": 2 * width}}
    for name, levels, group in _schemes(width):
        grouped = exact.view(len(exact), -1, group)
        scale = grouped.abs().amax(-1, keepdim=True) / (2 ** (levels - 1) - 1)
        back = ((grouped / scale).round() * scale).view_as(exact)
        size = width * levels / 8 + width / group * 2
        found[name] = {
            "error": round((back - exact).square().mean().sqrt().item(), 4),
            "over_bfloat16": round((back - exact).square().mean().sqrt().item() / rounded, 1),
            "cosine": round(torch.nn.functional.cosine_similarity(back, exact, dim=-1).mean().item(), 5),
            "bytes_per_token": int(size),
        }
        print(f"  {name:<26} error {found[name]['error']:.4f}  cosine {found[name]['cosine']:.5f}  {int(size)} B/token")
    stored = text_table([[0] * len(measured)], [measured], "int8", width, mean, deviation)
    ours = (torch.cat(decode_table(stored, mean, deviation)) - measured) / deviation
    found["ours int8"] = {"error": round(ours.square().mean().sqrt().item(), 4)}
    return found


def _schemes(width: int) -> Iterator[tuple[str, int, int]]:
    for levels in (8, 6, 4):
        yield f"{levels} bits, one scale", levels, width
        yield f"{levels} bits, groups of 64", levels, 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="package:smollm2", help="folder, hub id or package of a causal LLM")
    parser.add_argument("--quick", action="store_true", help="50 captions of either kind, not 200")
    arguments = parser.parse_args()
    schemes = fewer_bits(arguments.model, 50 if arguments.quick else 200)
    print(json.dumps({"benchmark": "bits", "model": arguments.model, "schemes": schemes}))


if __name__ == "__main__":
    main()
