"""Precomputing prompt states: this project's encoder against the two loops everyone writes, in the
same run.

    python benchmarks/embed.py [--quick]                SmolLM2 on the CPU
    python benchmarks/embed.py --device cuda --model FOLDER               a real LLM on a GPU
    python benchmarks/embed.py --device cuda --random-llama 8b --batch 64
                                                        LLaMA-3-8B's shape, no download

Peer "plain": the whole causal LM with its head, arrival order, padded to the longest caption of the
batch, `output_hidden_states`. Peer "fixed": the same, padded to 300 tokens as PixArt-style
extractors do. All three see the same ids (instruction + caption) and must give the same states.
Captions: one third from DPG-Bench (long), the others from GenEval and T2I-CompBench (short), see
--long-share; where those lists are not beside the checkout, the same lengths are generated. Needs
neither Ray nor a network. The last line printed is one JSON object.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lidit.config import PAPER_INSTRUCTION, EncoderSettings
from lidit.text import EncoderSpec, PromptEncoder, PromptTokenizer, resolve_encoder
from lidit.text.batching import Padding
from lidit.text.trunk import Trunk

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
clock = "wall"
DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
FIXED = 300
UNREAD = 2  # last blocks of an LLM that prompt states do without: layer -3
SHAPES = {  # blocks, width, feed-forward, heads, key-value heads, vocabulary
    "tiny": (4, 64, 128, 4, 2, 2000),
    "1b": (16, 2048, 8192, 32, 8, 128_256),
    "8b": (32, 4096, 14_336, 32, 8, 128_256),
}


def public_prompts(count: int, long_share: float = 1 / 3, seed: int = 0) -> tuple[list[str], str]:
    """`count` distinct captions, short and long, in random order; and where they are from."""
    source = random.Random(seed)
    short, long = [], []
    if (DATA / "dpg_bench" / "prompts.jsonl").is_file():
        short = (DATA / "geneval" / "generation_prompts.txt").read_text().splitlines()
        for name in ("color_val", "shape_val", "texture_val", "spatial_val", "complex_val"):
            short += (DATA / "t2i_compbench" / f"{name}.txt").read_text().splitlines()
        lines = (DATA / "dpg_bench" / "prompts.jsonl").read_text().splitlines()
        long = [json.loads(line)["prompt"] for line in lines]
        origin = "GenEval, T2I-CompBench, DPG-Bench"
    else:
        words = [
            f"{a}{b}"
            for a in ("re", "blo", "sta", "ki", "mun")
            for b in ("d", "lor", "ven", "tic", "ster", "")
        ]
        short = [" ".join(source.choices(words, k=source.randint(4, 13))) for _ in range(count)]
        long = [
            " ".join(source.choices(words, k=max(20, round(source.gauss(67, 18)))))
            for _ in range(count)
        ]
        origin = "generated with the lengths of GenEval and DPG-Bench"
    short, long = (
        list(dict.fromkeys(line.strip() for line in part if line.strip())) for part in (short, long)
    )
    longs = min(round(count * long_share), len(long))
    chosen = source.sample(long, longs) + source.sample(short, min(count - longs, len(short)))
    source.shuffle(chosen)
    return chosen, origin


@dataclass
class Rate:
    """Seconds spent on captions and their tokens."""

    seconds: float = 0.0
    captions: int = 0
    tokens: int = 0

    def add(self, seconds: float, captions: int, tokens: int) -> None:
        self.seconds, self.captions, self.tokens = (
            self.seconds + seconds,
            self.captions + captions,
            self.tokens + tokens,
        )

    @property
    def per_caption(self) -> float:
        return self.seconds / self.captions


class Peer:
    """The loop everyone writes."""

    def __init__(
        self, model: Any, context: Sequence[int], layer: int, batch: int, pad_to: int | None
    ) -> None:
        self.model, self.context, self.layer, self.batch, self.pad_to = (
            model,
            list(context),
            layer,
            batch,
            pad_to,
        )
        self.device = next(model.parameters()).device

    @torch.inference_mode()
    def __call__(self, captions: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        states: list[torch.Tensor] = []
        for start in range(0, len(captions), self.batch):
            rows = [self.context + list(ids) for ids in captions[start : start + self.batch]]
            longest = self.pad_to or max(len(row) for row in rows)
            rows = [row[:longest] for row in rows]
            ids = torch.tensor(
                [row + [0] * (longest - len(row)) for row in rows], device=self.device
            )
            mask = torch.tensor(
                [[1] * len(row) + [0] * (longest - len(row)) for row in rows], device=self.device
            )
            output = self.model(
                input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False
            )
            hidden = output.hidden_states[self.layer].cpu()
            states += [hidden[i, len(self.context) : len(row)] for i, row in enumerate(rows)]
        return states


def ours(
    encoder: PromptEncoder, captions: Sequence[Sequence[int]], budget: int
) -> list[torch.Tensor]:
    states: list[torch.Tensor] = [torch.empty(0)] * len(captions)
    for rows, flat in encoder.encode_tokens(captions, budget):
        for row, found in zip(rows, flat.split([len(captions[row]) for row in rows]), strict=True):
            states[row] = found
    return states


def timed(device: str, work: Callable[[], Any]) -> tuple[float, Any]:
    if device == "cuda":
        torch.cuda.synchronize()
    started = CLOCKS[clock]()
    result = work()
    if device == "cuda":
        torch.cuda.synchronize()
    return CLOCKS[clock]() - started, result


def worst_error(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> float:
    """Largest relative difference of a caption's states; peers may have cut a caption at 300
    tokens.
    """
    pairs = [(a[: len(b)].float(), b.float()) for a, b in zip(found, expected, strict=True)]
    return max(float((a - b).norm() / b.norm()) for a, b in pairs)


def dense_rate(encoder: PromptEncoder, seconds: float) -> float:
    """Tokens per second of the same trunk at its best: full rectangles, no padding, several shapes
    tried.
    """
    best = 0.0
    for rows, length in ((8, 64), (16, 64), (32, 64), (64, 64), (256, 64), (32, 256)):
        if rows * length > (16_384 if encoder.trunk.device.type == "cuda" else 2048):
            continue
        captions = [[5 + (i + row) % 100 for i in range(length)] for row in range(rows)]
        spent, count = 0.0, 0
        while spent < seconds / 6 or count < 2:
            once, _ = timed(
                encoder.trunk.device.type, functools.partial(ours, encoder, captions, rows * length)
            )
            if count:  # the first warms up
                spent += once
                best = max(best, rows * length / once)
            count += 1
    return best


def load_real(arguments: argparse.Namespace) -> tuple[PromptEncoder, Any]:
    from transformers import AutoModelForCausalLM

    settings = EncoderSettings(
        name="bench", model=arguments.model, chat_template=arguments.model.endswith("smollm2")
    )
    spec = resolve_encoder(settings, arguments.device)
    full = AutoModelForCausalLM.from_pretrained(
        spec.folder, dtype=getattr(torch, spec.dtype), use_safetensors=True
    ).to(arguments.device)
    return PromptEncoder.load(spec, arguments.device), full.eval()


def load_random(
    arguments: argparse.Namespace, captions: Sequence[str], folder: Path
) -> tuple[PromptEncoder, Any]:
    """A random LLaMA of a given shape; the encoder's trunk shares the full model's blocks."""
    from transformers import AutoModelForCausalLM

    name, device = arguments.random_llama, arguments.device
    with torch.device(device):
        full = AutoModelForCausalLM.from_config(
            llama_config(name, 0), dtype=compute_dtype(device)
        ).eval()
    trunk = random_trunk(name, device, blocks=1)
    trunk.layers, trunk.embed_tokens = (
        torch.nn.ModuleList(full.model.layers[:-UNREAD]),
        full.model.embed_tokens,
    )
    trunk.config.num_hidden_layers = len(trunk.layers)
    return random_encoder(name, trunk, captions, folder), full


def llama_config(name: str, without: int) -> Any:
    """The config of a LLaMA of shape `name` `without` its last blocks."""
    from transformers import LlamaConfig

    layers, width, inner, heads, groups, vocabulary = SHAPES[name]
    return LlamaConfig(
        num_hidden_layers=layers - without, hidden_size=width, intermediate_size=inner,
        num_attention_heads=heads,
        num_key_value_heads=groups, vocab_size=vocabulary, max_position_embeddings=8192,
    )  # fmt: skip


def compute_dtype(device: str) -> torch.dtype:
    return torch.bfloat16 if device == "cuda" else torch.float32


def random_trunk(name: str, device: str, blocks: int | None = None) -> Any:
    """A random LLaMA of shape `name` without head: `blocks` of its blocks, or all that prompt
    states need.
    """
    from transformers import AutoModel

    kept = SHAPES[name][0] - UNREAD if blocks is None else blocks
    config = llama_config(name, SHAPES[name][0] - kept)
    with torch.device(device):
        return AutoModel.from_config(config, dtype=compute_dtype(device)).eval()


def random_encoder(name: str, trunk: Any, captions: Sequence[str], folder: Path) -> PromptEncoder:
    """An encoder around `random_trunk`, with a tokenizer that has learned from `captions`, written
    to `folder`.
    """
    _write_tokenizer(folder, captions)
    layers, width = SHAPES[name][:2]
    dtype = str(next(trunk.parameters()).dtype).removeprefix("torch.")
    spec = EncoderSpec(
        name="bench", folder=str(folder), kind="causal", model_type="llama", width=width,
        blocks=layers - UNREAD,
        total_blocks=layers, system_prompt="", instruction=PAPER_INSTRUCTION, chat_template=False,
        max_tokens=256,
        dtype=dtype, storage="bfloat16", config_sha256="", weights_sha256="", tokenizer_sha256="",
    )  # fmt: skip
    return PromptEncoder(spec, PromptTokenizer(spec), Trunk(spec, trunk))


def _write_tokenizer(folder: Path, captions: Sequence[str]) -> None:
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    learned = ByteLevelBPETokenizer()
    learned.train_from_iterator(captions, vocab_size=2000, special_tokens=["<s>", "</s>"])
    backend = learned._tokenizer
    PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    (folder / "config.json").write_text('{"model_type": "llama"}')


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="400 captions and fewer batches of the peers"
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--model", default="package:smollm2")
    parser.add_argument("--random-llama", choices=sorted(SHAPES))
    parser.add_argument("--captions", type=int, default=2000)
    parser.add_argument("--long-share", type=float, default=1 / 3, help="share of long captions")
    parser.add_argument("--batch", type=int, default=32, help="captions in a batch of the peers")
    parser.add_argument("--budget", type=int, default=None, help="padded tokens in a batch of ours")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument(
        "--peak-tflops", type=float, default=989.0, help="of the GPU at bf16, for the utilisation"
    )
    parser.add_argument(
        "--clock", choices=sorted(CLOCKS), default="wall", help="cpu: for a machine others use too"
    )
    arguments = parser.parse_args()
    global clock
    clock = arguments.clock
    torch.set_num_threads(arguments.threads)
    count, rounds = (
        (400, 1) if arguments.quick else (arguments.captions, max(1, arguments.captions // 1000))
    )
    peer_batches = (5, 2) if arguments.quick else (12, 6)  # of plain and fixed, per round
    budget = arguments.budget or (32_768 if arguments.device == "cuda" else 2048)
    captions, origin = public_prompts(count, arguments.long_share)
    with tempfile.TemporaryDirectory() as folder:
        encoder, full = (
            load_random(arguments, captions, Path(folder))
            if arguments.random_llama
            else load_real(arguments)
        )
    tokens = encoder.tokenizer.tokenize(captions)
    ids = [list(row.token_ids) for row in tokens]
    context = encoder.tokenizer.context_ids
    layer = encoder.spec.blocks  # hidden_states[layer] counted from the embeddings
    peers = {
        "plain": Peer(full, context, layer, arguments.batch, None),
        "fixed": Peer(full, context, layer, arguments.batch, FIXED),
    }
    rates = {"ours": Rate(), "plain": Rate(), "fixed": Rate()}
    padding, error = Padding(), 0.0
    ours(encoder, ids[: arguments.batch], budget)  # warm-up
    for peer in peers.values() if arguments.device == "cuda" else ():
        peer(ids[: arguments.batch])
    for number in range(rounds):
        part = ids[number * len(ids) // rounds : (number + 1) * len(ids) // rounds]
        # One after the other: between a peer's batches, whose logits alone take a gigabyte, ours
        # would pay for memory that the allocator has just given back.
        seconds, states = timed(arguments.device, functools.partial(ours, encoder, part, budget))
        rates["ours"].add(seconds, len(part), sum(map(len, part)))
        for (name, peer), batches in zip(peers.items(), peer_batches, strict=True):
            some = part[: batches * arguments.batch]
            theirs, expected = timed(arguments.device, functools.partial(peer, some))
            rates[name].add(theirs, len(some), sum(map(len, some)))
            error = max(error, worst_error(states[: len(expected)], expected))
        padding += encoder.padding(part, budget)
        done = ", ".join(f"{name} {1 / rate.per_caption:.2f}/s" for name, rate in rates.items())
        print(f"round {number + 1} of {rounds}: captions {done}", flush=True)
    dense = dense_rate(encoder, 12 if arguments.quick else 30)
    report(arguments, encoder, rates, padding, dense, error, origin, len(context), budget)
    if error > (1e-4 if encoder.spec.dtype == "float32" else 0.1):
        sys.exit("the three loops do not give the same states")


def report(
    arguments: argparse.Namespace, encoder: PromptEncoder, rates: dict[str, Rate], padding: Padding,
    dense: float,
    error: float, origin: str, context: int, budget: int,
) -> None:  # fmt: skip
    mine = rates["ours"]
    useful = mine.tokens / mine.seconds
    embedding = sum(
        p.numel() for name, p in encoder.trunk.model.named_parameters() if "embed" in name
    )
    flops = 2 * (encoder.trunk.parameters - embedding)  # per token, attention scores left out
    result: dict[str, Any] = {
        "benchmark": "embed",
        "model": arguments.random_llama or arguments.model,
        "device": torch.cuda.get_device_name()
        if arguments.device == "cuda"
        else f"cpu, {arguments.threads} threads",
        "clock": clock,
        "dtype": encoder.spec.dtype,
        "captions": mine.captions,
        "captions_from": origin,
        "long_share": round(arguments.long_share, 3),
        "tokens_per_caption": round(mine.tokens / mine.captions, 1),
        "context_tokens": context,
        "token_budget": budget,
        "ratio_plain": round(rates["plain"].per_caption / mine.per_caption, 2),
        "ratio_fixed": round(rates["fixed"].per_caption / mine.per_caption, 2),
        "padding_waste": round(padding.waste, 4),
        "captions_per_second": {
            name: round(1 / rate.per_caption, 2) for name, rate in rates.items()
        },
        "useful_tokens_per_second": round(useful, 1),
        "dense_tokens_per_second": round(dense, 1),
        "share_of_dense_rate": round(useful / dense, 3),
        "relative_error": error,
    }
    if arguments.device == "cuda":
        computed = padding.computed / mine.seconds
        result["model_flop_utilisation"] = round(useful * flops / (arguments.peak_tflops * 1e12), 4)
        result["computed_flop_utilisation"] = round(
            computed * flops / (arguments.peak_tflops * 1e12), 4
        )
        result["peak_memory_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
