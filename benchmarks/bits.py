"""What a stored state takes, and what it loses: coded, int4 and int8 files against rotation +
Lloyd-Max.

    python -m benchmarks.bits --captions parti=parti.txt compbench=compbench.txt dpg=dpg.txt

Each source of captions (a text file, a caption per line) is held out once: mean, deviation and code
come from captions of the others, evenly. Rates are of complete unit files, token ids, checksums and
row offsets included, per stored number. The first source gives the figures of the last line, one
JSON object; the others are other domains. The peer is
what general vector quantizers do: a random rotation, one scale per token, Lloyd-Max levels; its
rate is interpolated at the error that coded states have.

Without --captions two kinds of made-up captions are measured. --keep FOLDER keeps states between
runs.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from scipy.stats import norm

from lidit.config import EncoderSettings
from lidit.store import channel_statistics
from lidit.store.coding import compiled, rans
from lidit.store.coding.fit import fit_code
from lidit.store.coding.transform import StateCode, quantise, restore, standardise
from lidit.store.files.atomic import publish_table
from lidit.store.files.folder import Folder
from lidit.store.packing import decode, encode
from lidit.store.states import stored_table
from lidit.text import PromptEncoder, resolve_encoder

ERRORS = (0.1, 0.2)
CALIBRATION = 1024  # captions, as a corpus gives


@dataclass
class Source:
    """Captions of one kind and what an LLM makes of them."""

    name: str
    token_ids: list[list[int]]
    states: list[torch.Tensor]  # [T, W] each


@dataclass
class Figures:
    """Of one LLM: held-out source -> what was measured."""

    width: int
    of: dict[str, dict[str, Any]] = field(default_factory=dict)
    speeds: dict[str, float] = field(default_factory=dict)


def made_up() -> dict[str, list[str]]:
    """Two kinds of captions for a run without files."""
    nouns, colours = (
        ("cat", "clock", "bicycle", "teapot", "lighthouse"),
        ("red", "pale blue", "striped", "wooden"),
    )
    pairs = list(product(colours, nouns, colours, nouns))
    return {
        "plain": [f"a {c} {n} beside a {d} {m}" for c, n, d, m in pairs],
        "long": [
            f"In the rain at dusk a {n}, {c} all over, leans on an old {m}; it is {d}."
            for c, n, d, m in pairs
        ],
    }


def read_source(
    encoder: PromptEncoder, llm: str, source: tuple[str, list[str]], count: int, keep: Path | None
) -> Source:
    """States of some of a source's captions, computed or as an earlier run has kept them."""
    name, texts = source
    texts = list(texts)
    random.Random(0).shuffle(texts)
    texts = texts[:count]
    ids = [list(tokens.token_ids) for tokens in encoder.tokenizer.tokenize(texts)]
    file = None if keep is None else keep / f"{llm}-{name}.npz"
    if file is not None and file.is_file():
        held = np.load(file)
        states = list(torch.from_numpy(held["states"]).split(held["lengths"].tolist()))[:count]
    else:
        states = [found.states.float() for found in encoder.encode(texts, 2048)]
        if file is not None:
            np.savez(file, states=torch.cat(states).numpy(), lengths=[len(s) for s in states])
    assert [len(row) for row in ids] == [len(s) for s in states], f"{file}: of other captions"
    return Source(name, ids, states)


def file_bits(
    source: Source, packed: tuple[torch.Tensor, torch.Tensor | None], storage: str, code: Any
) -> float:
    """Bits per number of a complete unit file."""
    width = source.states[0].shape[1]
    table = stored_table(source.token_ids, *packed, storage, width, code)
    with TemporaryDirectory() as folder:
        size = publish_table(Folder.at(folder), "unit.arrow", table).bytes
    return 8 * size / (sum(map(len, source.token_ids)) * width)


def losses(z: torch.Tensor, back: torch.Tensor) -> dict[str, float]:
    """Errors in deviations, of all and of the worst token; of the worst token as a share of its own
    size, too.
    """
    off = (back - z).norm(dim=1) / z.norm(dim=1)
    cosine = torch.nn.functional.cosine_similarity(z, back)
    return {
        "rms": round(float((back - z).square().mean().sqrt()), 4),
        "relative": round(float((back - z).norm() / z.norm()), 4),
        "cosine_1st_percentile": round(float(cosine.quantile(0.01)), 4),
        "worst_token": round(float((back - z).square().mean(1).sqrt().max()), 3),
        "worst_relative": round(float(off.max()), 3),
    }


def lloyd_max(bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Levels and thresholds of least squared error for a normal distribution."""
    levels = norm.ppf((np.arange(2**bits) + 0.5) / 2**bits)
    for _ in range(500):
        edges = np.concatenate([[-np.inf], (levels[1:] + levels[:-1]) / 2, [np.inf]])
        levels = -np.diff(norm.pdf(edges)) / np.diff(norm.cdf(edges))
    return levels.astype(np.float32), edges[1:-1].astype(np.float32)


def rotation(z: torch.Tensor) -> list[tuple[float, float]]:
    """(bits per number with a 16-bit scale per token, rms error) of a random rotation and Lloyd-Max
    levels.
    """
    width = z.shape[1]
    turn, _ = torch.linalg.qr(torch.randn(width, width, generator=torch.Generator().manual_seed(0)))
    scale = z.square().mean(1, keepdim=True).sqrt()
    turned, found = (z / scale) @ turn, []
    for bits in (1, 2, 3, 4, 5):
        levels, edges = map(torch.from_numpy, lloyd_max(bits))
        back = (levels[torch.bucketize(turned, edges)] @ turn.T) * scale
        found.append((bits + 16 / width, float((back - z).square().mean().sqrt())))
    return found


def bits_at(curve: Sequence[tuple[float, float]], error: float) -> float:
    """Bits at which a scheme has this error: linear in its logarithm between whole bits."""
    bits, errors = zip(*curve, strict=True)
    return float(np.interp(-np.log(error), [-np.log(e) for e in errors], bits))


def held_out(test: Source, others: Sequence[Source]) -> dict[str, Any]:
    """One source coded with what the others gave."""
    share = -(-CALIBRATION // len(others))
    calibration = [state for other in others for state in other.states[:share]]
    mean, deviation = channel_statistics(calibration)
    sample = [standardise(state, mean, deviation) for state in calibration]
    flat = torch.cat(test.states)
    z = standardise(flat, mean, deviation)
    found: dict[str, Any] = {"calibration_tokens": sum(map(len, calibration)), "tokens": len(flat)}
    for storage in ("int8", "int4"):
        packed = encode(flat, storage, mean, deviation)
        back = standardise(decode(packed[0], storage, packed[1], mean, deviation), mean, deviation)
        found[storage] = {
            "bits": round(file_bits(test, packed, storage, None), 3),
            **losses(z, back),
        }
    turned = rotation(z)
    for error in ERRORS:
        began = time.process_time()
        code = fit_code(sample, error)
        seconds = time.process_time() - began
        packed = quantise(z, code)
        lost = losses(z, restore(*packed, code))
        bits = file_bits(test, packed, "coded", code)
        # The peer's rate is without token ids and offsets, so the code's is for this comparison.
        rows = compiled.encode_rows(
            packed[0].numpy(), packed[1].numpy(), _lengths(test), _model(code)
        )
        bare = 8 * sum(map(len, rows)) / z.numel()
        found[f"coded {error}"] = {
            "bits": round(bits, 3),
            "bits_of_states": round(bare, 3),
            "over_asked": round(lost["rms"] / error, 3),
            "ratio_int8": round(found["int8"]["bits"] / bits, 2),
            "rotation_bits": round(bits_at(turned, lost["rms"]), 3),
            "rotation_gap": round(bits_at(turned, lost["rms"]) - bare, 3),
            "expected_bits": round(code.quality.bits, 3) if code.quality else None,
            "fit_seconds": round(seconds, 1),
            **lost,
        }
    for name, row in found.items():
        print(f"    {name:<20} {row}", flush=True)
    return found


def _lengths(source: Source) -> np.ndarray:
    return np.asarray([len(ids) for ids in source.token_ids], np.int64)


def _model(code: StateCode) -> rans.Model:
    assert code.model is not None
    return code.model


def speeds(encoder: PromptEncoder, test: Source, texts: list[str]) -> dict[str, float]:
    """Processor time on one core: the LLM's tokens/s, the coder's, and what decoding takes."""
    mean, deviation = channel_statistics(test.states)
    code = fit_code([standardise(state, mean, deviation) for state in test.states], ERRORS[0])
    flat, tokens, model = torch.cat(test.states), _lengths(test), _model(code)
    began = time.process_time()
    computed = sum(len(found.states) for found in encoder.encode(texts[:60], 2048))
    found = {"llm_tokens_per_second": computed / (time.process_time() - began)}

    def coded() -> list[bytes]:
        values, scale = encode(flat, "coded", mean, deviation, code)
        assert scale is not None
        return compiled.encode_rows(values.numpy(), scale.numpy(), tokens, model)

    rows = coded()  # compiles, too
    found["encode_over_llm"] = len(flat) / _seconds(coded) / found["llm_tokens_per_second"]
    content, ends = (
        np.frombuffer(b"".join(rows), np.uint8),
        np.cumsum([0, *map(len, rows)], dtype=np.int64),
    )
    compiled.decode_rows(content, ends, tokens, model)
    values = flat.numel() / 1e6
    found["decode_numpy_millions"] = values / _seconds(
        lambda: rans.decode_rows(content, ends, tokens, model)
    )
    found["decode_compiled_millions"] = values / _seconds(
        lambda: compiled.decode_rows(content, ends, tokens, model)
    )
    return {name: round(value, 1) for name, value in found.items()}


def _seconds(work: Callable[[], object]) -> float:
    """Processor time, the best of three."""
    taken = []
    for _ in range(3):
        began = time.process_time()
        work()
        taken.append(time.process_time() - began)
    return min(taken)


def measure(llm: str, sources: dict[str, list[str]], count: int, keep: Path | None) -> Figures:
    """Everything about one LLM."""
    encoder = PromptEncoder.load(
        resolve_encoder(EncoderSettings(name="bits", model=f"package:{llm}"), "cpu"), "cpu"
    )
    read = [read_source(encoder, llm, source, count, keep) for source in sources.items()]
    figures = Figures(encoder.spec.width)
    for test in read:
        print(f"  {llm}, {test.name} held out", flush=True)
        figures.of[test.name] = held_out(test, [other for other in read if other is not test])
    figures.speeds = speeds(encoder, read[0], next(iter(sources.values())))
    print(f"    {figures.speeds}", flush=True)
    return figures


def summary(found: dict[str, Figures]) -> dict[str, Any]:
    """The figures that have goals, of the first source; errors over all sources."""
    first = {llm: next(iter(figures.of.values())) for llm, figures in found.items()}
    at = "coded 0.1"
    rows = [
        row
        for figures in found.values()
        for source in figures.of.values()
        for row in source.items()
    ]
    coded = [row for name, row in rows if name.startswith("coded")]
    return {
        **{f"bits_01_{llm}": source[at]["bits"] for llm, source in first.items()},
        **{f"bits_02_{llm}": source["coded 0.2"]["bits"] for llm, source in first.items()},
        "ratio_int8": min(source[at]["ratio_int8"] for source in first.values()),
        "rotation_gap_01": min(source[at]["rotation_gap"] for source in first.values()),
        "rotation_gap_02": min(source["coded 0.2"]["rotation_gap"] for source in first.values()),
        "int4_bits": {llm: source["int4"]["bits"] for llm, source in first.items()},
        "int4_rms": {llm: source["int4"]["rms"] for llm, source in first.items()},
        "error_over_asked": [
            min(row["over_asked"] for row in coded),
            max(row["over_asked"] for row in coded),
        ],
        "worst_token_01": max(row["worst_token"] for name, row in rows if name == at),
        "worst_relative_01": max(row["worst_relative"] for name, row in rows if name == at),
        "speeds": {llm: figures.speeds for llm, figures in found.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--captions", nargs="+", metavar="NAME=FILE", help="sources, at least two")
    parser.add_argument("--llm", nargs="+", default=["smollm2", "gemma3"], help="packaged LLMs")
    parser.add_argument("--count", type=int, default=600, help="captions of a source")
    parser.add_argument("--quick", action="store_true", help="80 captions of a source")
    parser.add_argument("--keep", type=Path, help="folder in which states are kept between runs")
    arguments = parser.parse_args()
    sources = made_up()
    if arguments.captions:
        named = (argument.partition("=") for argument in arguments.captions)
        sources = {
            name: [line for line in Path(file).read_text().splitlines() if line]
            for name, _, file in named
        }
    torch.set_num_threads(1)
    count = 80 if arguments.quick else arguments.count
    found = {llm: measure(llm, sources, count, arguments.keep) for llm in arguments.llm}
    details = {llm: figures.of for llm, figures in found.items()}
    print(json.dumps({"benchmark": "bits", **summary(found), "sources": details}))


if __name__ == "__main__":
    main()
