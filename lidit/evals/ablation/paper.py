"""What the paper's ablations found (arXiv 2406.11831, tables 2, 3, 5 and 6), and which of it an
ablation can test.

Scores are T2I-CompBench average and DPG-Bench average. Arms of a recipe that bear these names are
compared with them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Scores = tuple[float, float | None]

PAPER: dict[str, Scores] = {
    "baseline": (38.72, 66.15),
    "instruction": (48.41, 73.45),
    "refiner": (54.02, 77.08),
    "both": (56.79, 78.62),
    "two-llms": (60.31, 80.25),
    "causal-refiner": (45.84, 71.01),
    "encoder": (48.82, 73.56),
    "encoder-refiner": (49.52, 74.63),
    "refiner-depth-1": (48.25, None),
    "refiner-depth-3": (55.13, None),
    "refiner-ungated": (53.47, None),
    "second-llm": (56.13, None),
    "concatenation": (58.32, None),
}
MEANING = {
    "baseline": "one LLM's states as they are, no instruction",
    "instruction": "the paper's instruction before the caption",
    "refiner": "token refiner of two blocks, no instruction",
    "both": "instruction and refiner",
    "two-llms": "both, a second LLM, collaborative refiner",
    "causal-refiner": "refiner that keeps the causal mask",
    "own-token": "refiner whose attention sees only the own token: its parameters without its "
    "mixing (ours)",
    "encoder": "a bidirectional encoder in the LLM's place (the paper's is T5)",
    "encoder-refiner": "the bidirectional encoder with a refiner",
    "unmasked": "the LLM run with its mask removed, no refiner (ours)",
    "refiner-depth-1": "refiner of one block",
    "refiner-depth-3": "refiner of three blocks",
    "refiner-ungated": "refiner without gates",
    "second-llm": "instruction and refiner on the second LLM alone",
    "concatenation": "both LLMs, concatenated without collaborative refiner",
    "one-layer": "one layer, the template's tokens behind the caption dropped (ours)",
    "layers-mean": "four layers, each normalised, averaged (ours)",
    "layers-learned": "four layers by learned weights (ours)",
    "layers-per-block": "four layers by learned weights of each transformer block (ours)",
    "suffix-kept": "one layer, the template's tokens behind the caption kept (ours)",
    "states-exact": "states in float32 (ours)",
    "states-int8": "states in int8 (ours)",
    "states-coded-1": "coded states, storage_error 0.1 (ours)",
    "states-coded-2": "coded states, storage_error 0.2 (ours)",
    "states-coded-3": "coded states, storage_error 0.3 (ours)",
    "control": "the transformer sees the caption's first words only, a full-attention refiner all "
    "of them (ours)",
    "control-causal": "the same with a causal refiner, which cannot carry anything back",
    "control-none": "the same without a refiner",
}


@dataclass(frozen=True)
class Claim:
    """`better` scores higher than `worse`; `table`: where the paper says so.

    "ours" compares with an arm the paper has not, "layers" arms of several layers of an LLM and
    "storage" arms on states as they are stored, which it has not either; "control" is the
    demonstration of the mechanism (docs/evidence.md).
    by: what decides. Arms that all learn differ in how fast; the control asks what can be learned
    at all.
    """

    table: str
    better: str
    worse: str
    by: Literal["learning", "final"] = "learning"


CLAIMS = (
    Claim("2", "instruction", "baseline"),
    Claim("2", "refiner", "baseline"),
    Claim("2", "both", "instruction"),
    Claim("2", "both", "refiner"),
    Claim("2", "two-llms", "both"),
    Claim("3", "refiner", "causal-refiner"),
    Claim("3", "causal-refiner", "baseline"),
    Claim("3", "encoder", "baseline"),
    Claim("3", "encoder-refiner", "encoder"),
    Claim("5", "refiner", "refiner-depth-1"),
    Claim("5", "refiner-depth-3", "refiner"),
    Claim("5", "refiner", "refiner-ungated"),
    Claim("6", "concatenation", "both"),
    Claim("6", "concatenation", "second-llm"),
    Claim("6", "two-llms", "concatenation"),
    Claim("ours", "refiner", "own-token"),
    Claim("ours", "unmasked", "baseline"),
    Claim("layers", "layers-mean", "one-layer"),
    Claim("layers", "layers-learned", "one-layer"),
    Claim("layers", "layers-per-block", "layers-learned"),
    Claim("layers", "suffix-kept", "one-layer"),
    Claim("storage", "states-exact", "states-int8", by="final"),
    Claim("storage", "states-exact", "states-coded-1", by="final"),
    Claim("storage", "states-exact", "states-coded-2", by="final"),
    Claim("storage", "states-exact", "states-coded-3", by="final"),
    Claim("control", "control", "control-causal", by="final"),
    Claim("control", "control", "control-none", by="final"),
)
