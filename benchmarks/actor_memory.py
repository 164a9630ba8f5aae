"""How much memory an encoder actor takes above its model, for small and large units and for long
captions.

    python -m benchmarks.actor_memory --quick

Each case runs the actor's own code (two units at a time, as on a cluster) in a process of its own:
a random LLaMA of 1,024 channels whose blocks are few, so that states, not arithmetic, are what
there is to hold. The peer is what a program needs that keeps a unit's states until it writes them.
The last line printed is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.embed import _write_tokenizer
from benchmarks.store import make_corpus
from lidit.config import EncoderSettings, PoolSettings
from lidit.store import FamilyWriter
from lidit.text.embedding import PIECE_BYTES
from lidit.text.specs import resolve_encoder
from pipelines.corpus.embed import CALLS_PER_ACTOR
from pipelines.corpus.encode_units import TOKENIZED, EncodeJob, EncodeUnits

WIDTH, LONGEST = 1024, 4096
# Captions in a unit, tokens of each.
CASES = {
    "small": (64, 64),
    "medium": (1024, 64),
    "large": (4096, 64),
    "long captions": (8, LONGEST),
}
MIB = 1 << 20


def make_model(folder: Path) -> None:
    torch.manual_seed(0)
    shape = LlamaConfig(
        hidden_size=WIDTH, intermediate_size=WIDTH, num_hidden_layers=3, num_attention_heads=16,
        vocab_size=4096,
        max_position_embeddings=2 * LONGEST,
    )  # fmt: skip
    _write_tokenizer(folder, ["a red cube on a blue sphere"])
    LlamaForCausalLM(shape).save_pretrained(folder)  # and its config over the tokenizer's


def mebibytes(field: str) -> float:
    """A field of this process's memory figures."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[field].split()[0]) / 1024


def actor(folder: Path, captions: int, tokens: int) -> None:
    """Encode as many units as an actor takes at a time; prints the growth above the loaded model in
    MiB.
    """
    torch.set_num_threads(2)
    corpus = folder / f"corpus-{captions}-{tokens}"
    units = CALLS_PER_ACTOR
    make_corpus(corpus, [captions] * units)
    settings = EncoderSettings(name="random", model=str(folder / "model"), max_tokens=LONGEST)
    spec = resolve_encoder(settings, "cpu")
    FamilyWriter.open_or_create(str(corpus), "text", spec.name, spec.to_dict())
    works = EncodeUnits(EncodeJob(str(corpus), settings, spec, PoolSettings()))
    assert works.problem is None, works.problem
    flags = [False] * captions
    ids = [[5 + i % 200 for i in range(tokens)]] * captions
    row = {"token_ids": ids, "truncated": flags, "control": flags, "merged": flags}
    tables = [
        pa.Table.from_pylist([{"unit": unit, **row}], schema=TOKENIZED) for unit in range(units)
    ]
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = mebibytes("VmRSS")
    with ThreadPoolExecutor(CALLS_PER_ACTOR) as calls:
        for done in calls.map(works, tables):
            assert done["problem"].to_pylist() == [None]
    print(mebibytes("VmHWM") - before)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="the same: it takes some three minutes"
    )
    parser.add_argument("--actor", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.actor:
        actor(Path(arguments.actor[0]), *map(int, arguments.actor[1:]))
        return
    growth, states = {}, {}
    with tempfile.TemporaryDirectory() as work:
        make_model(Path(work) / "model")
        for name, (captions, tokens) in CASES.items():
            command = [
                sys.executable,
                "-m",
                "benchmarks.actor_memory",
                "--actor",
                work,
                str(captions),
                str(tokens),
            ]
            output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            growth[name] = round(float(output.split()[-1]), 1)
            states[name] = round(CALLS_PER_ACTOR * captions * tokens * WIDTH * 4 / MIB, 1)
            print(f"{name}: {captions:,} captions of {tokens:,} tokens: +{growth[name]} MiB; "
                  f"the states of {CALLS_PER_ACTOR} units are {states[name]} MiB",
                  flush=True)  # fmt: skip
    result = {
        "benchmark": "actor_memory",
        "peer": "keeping a unit's states until they are written",
        "growth_mib": growth,
        "states_mib": states,
        "piece_mib": PIECE_BYTES // MIB,
        "ratio_states_large": round(states["large"] / growth["large"], 2),
        "worst_mib": max(growth.values()),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
