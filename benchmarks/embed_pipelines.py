"""Prompt states as public pipelines want them: ours against their own `encode_prompt`, in the same
run.

    python benchmarks/embed_pipelines.py fibo  [--quick]
        BRIA FIBO's rule: two layers, bare captions
    python benchmarks/embed_pipelines.py flux2 [--quick]
        FLUX.2's rule: three layers, chat template, 512 tokens

Peer "one": one caption per call, as NeMo AutoModel's preprocessing and many scripts do it. Peer
"padded": batches, padded as the pipeline pads. Both run diffusers' own code on SmolLM2-135M (or
--model), with the same ids and the same states as ours.
Bytes: a caption's share of our unit file, and of a `torch.save` of what the pipeline gives for it,
both in bfloat16. The last line printed is one JSON object.
"""

from __future__ import annotations

import argparse
import functools
import io
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import embed
from benchmarks.embed import Rate, ours, public_prompts, timed, worst_error
from lidit.config import EncoderSettings
from lidit.text import PromptEncoder, resolve_encoder

LENGTH = 512  # FLUX.2's
RULES: dict[str, dict[str, Any]] = {
    "fibo": {"template": "{}", "layers": [-1, -2], "max_tokens": 3000, "empty": 0},
    "flux2": {
        "chat_template": True,
        "instruction": "",
        "suffix": "kept",
        "generation_prompt": True,
        "layers": [10, 20, 30],
        "max_tokens": LENGTH,
        "counted": "whole",
    },
}
Ask = Callable[[list[str]], tuple[torch.Tensor, torch.Tensor]]  # states [B, T, W] and mask [B, T]


def pipeline(rule: str, model: Any, tokenizer: Any) -> Ask:
    """What diffusers does under a rule."""
    import diffusers

    if rule == "fibo":
        pipe = diffusers.BriaFiboPipeline(None, None, None, model, tokenizer)

        def fibo(captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
            states, _, mask = pipe.get_prompt_embeds(captions, device=model.device)
            return states, mask

        return fibo

    layers = RULES["flux2"]["layers"]

    def flux2(captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        states = diffusers.Flux2KleinPipeline._get_qwen3_prompt_embeds(
            model, tokenizer, captions, max_sequence_length=LENGTH, hidden_states_layers=layers
        )
        texts = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": c}],
                tokenize=False,
                add_generation_prompt=True,
                enable_thinking=False,
            )
            for c in captions
        ]
        mask = tokenizer(texts, padding="max_length", max_length=LENGTH, return_tensors="pt")[
            "attention_mask"
        ]
        return states, mask

    return flux2


def peer(
    ask: Ask, captions: Sequence[str], batch: int, prefix: int
) -> tuple[list[torch.Tensor], int]:
    """States behind the prefix, and the bytes of a `torch.save` of each caption's row as the
    pipeline gives it.
    """
    found, written = [], 0
    with torch.inference_mode():
        for start in range(0, len(captions), batch):
            states, mask = ask(list(captions[start : start + batch]))
            for row, valid in zip(states.cpu(), mask.bool().cpu(), strict=True):
                found.append(row[valid][prefix:])
                if start == 0:
                    file = io.BytesIO()
                    torch.save(row.bfloat16().clone(), file)
                    written += len(file.getvalue())
    return found, written // min(batch, len(captions))


def spread(ids: Sequence[Sequence[int]], count: int) -> list[int]:
    """Rows evenly over all lengths, in their order: a peer that pads nothing costs what its
    captions' lengths say.
    """
    by_length = sorted(range(len(ids)), key=lambda row: len(ids[row]))
    return sorted(by_length[(2 * i + 1) * len(ids) // (2 * count)] for i in range(count))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rule", choices=sorted(RULES))
    parser.add_argument("--quick", action="store_true", help="100 captions")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--model", default="package:smollm2")
    parser.add_argument("--captions", type=int, default=1000)
    parser.add_argument(
        "--batch", type=int, default=16, help="captions in a batch of the padded peer"
    )
    parser.add_argument("--budget", type=int, default=2048, help="padded tokens in a batch of ours")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--clock", choices=sorted(embed.CLOCKS), default="wall")
    arguments = parser.parse_args()
    embed.clock = arguments.clock
    torch.set_num_threads(arguments.threads)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    count = 100 if arguments.quick else arguments.captions
    captions, origin = public_prompts(count)
    spec = resolve_encoder(
        EncoderSettings(name="bench", model=arguments.model, **RULES[arguments.rule]),
        arguments.device,
    )
    encoder = PromptEncoder.load(spec, arguments.device)
    full = AutoModelForCausalLM.from_pretrained(
        spec.folder, dtype=getattr(torch, spec.dtype), use_safetensors=True
    )
    tokenizer = AutoTokenizer.from_pretrained(spec.folder)
    ask = pipeline(arguments.rule, full.to(arguments.device).eval(), tokenizer)
    ids = [list(row.token_ids) for row in encoder.tokenizer.tokenize(captions)]
    prefix = len(encoder.tokenizer.prefix_ids)
    ours(encoder, ids[:8], arguments.budget)  # warm-up
    peer(ask, captions[:1], 1, prefix)
    seconds, states = timed(
        arguments.device, functools.partial(ours, encoder, ids, arguments.budget)
    )
    mine = Rate(seconds, len(ids), sum(map(len, ids)))
    # The peers are slow: a part of the captions, as long as all of them on average, is enough.
    ones, batches = spread(ids, max(8, count // 5)), spread(ids, 2 * arguments.batch)
    rates, errors, written = {}, [], 0
    for name, rows, size in (("one", ones, 1), ("padded", batches, arguments.batch)):
        some, mine_of_them = [captions[row] for row in rows], [states[row] for row in rows]
        seconds, (found, written) = timed(
            arguments.device, functools.partial(peer, ask, some, size, prefix)
        )
        rates[name] = Rate(seconds, len(some))
        errors.append(worst_error(mine_of_them, found))
        assert [len(row) for row in mine_of_them] == [len(row) for row in found]
    tokens = mine.tokens / mine.captions
    result = {
        "benchmark": "embed_pipelines",
        "rule": arguments.rule,
        "model": arguments.model,
        "device": torch.cuda.get_device_name()
        if arguments.device == "cuda"
        else f"cpu, {arguments.threads} threads",
        "clock": arguments.clock,
        "captions": mine.captions,
        "captions_from": origin,
        "tokens_per_caption": round(tokens, 1),
        "prefix_tokens": prefix,
        "ratio_one": round(rates["one"].per_caption / mine.per_caption, 2),
        "ratio_padded": round(rates["padded"].per_caption / mine.per_caption, 2),
        "captions_per_second": {
            n: round(1 / r.per_caption, 2) for n, r in {"ours": mine, **rates}.items()
        },
        "bytes_per_caption": {"ours": round(tokens * (2 * spec.width + 4)), "torch_save": written},
        "relative_error": max(errors),
    }
    print(json.dumps(result))
    if max(errors) > (1e-4 if spec.dtype == "float32" else 0.1):
        sys.exit("ours and the pipeline do not give the same states")


if __name__ == "__main__":
    main()
