"""One small embedding job, and how to run it in a process of its own that may be killed."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

from lidit.config import EncoderSettings, PoolSettings
from lidit.store import FamilyWriter, UnitStatistics
from lidit.text import PromptEncoder, resolve_encoder
from lidit.text.embedding import encoded_tables, ensure_shared
from tests.helpers.corpus_factory import make_corpus

WORDS = (
    "a",
    "red",
    "circle",
    "and",
    "two",
    "blue",
    "squares",
    "left",
    "of",
    "the",
    "green",
    "star",
    "圆形",
    "café",
)


def captions(units: int, rows: int, seed: int = 0) -> list[list[str]]:
    """Short and long captions mixed; the last unit is empty."""
    source = random.Random(seed)
    lengths = (1, 3, 5, 8, 40)
    made = [
        [" ".join(source.choices(WORDS, k=source.choice(lengths))) for _ in range(rows)]
        for _ in range(units - 1)
    ]
    made[0][0] = ""
    return [*made, []]


def make_job(folder: Path, units: int = 6, rows: int = 12) -> Path:
    make_corpus(folder, captions(units, rows))
    return folder


def encoder(model: Path, **changes: object) -> EncoderSettings:
    return EncoderSettings.model_validate(
        {"name": "tiny", "model": str(model), "storage": "int8"} | changes
    )


def contents(corpus: Path) -> dict[str, str]:
    """Name -> sha256 of everything a reader could see of the families' values."""
    files = [
        p
        for p in corpus.glob("text/**/*")
        if p.is_file() and (p.suffix == ".arrow" or p.name == "family.json")
    ]
    # its table also says how long each unit took
    files = [p for p in files if not p.name.startswith("MANIFEST")]
    return {str(p.relative_to(corpus)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def finished(corpus: Path) -> dict[str, int]:
    """Records of finished units -> when they were written."""
    return {p.name: p.stat().st_mtime_ns for p in corpus.glob("text/*/[0-9]*.json")}


def embed_here(corpus: Path, settings: EncoderSettings) -> list[int]:
    """The same job in this process, without a cluster; returns the units it computed."""
    encoder = PromptEncoder.load(resolve_encoder(settings, "cpu"), "cpu")
    writer = FamilyWriter.open_or_create(str(corpus), "text", settings.name, encoder.spec.to_dict())
    shared = ensure_shared(encoder, writer)
    pending = writer.pending()
    for unit in pending:
        tokens = encoder.tokenizer.tokenize(writer.corpus.captions(unit)["text"].to_pylist())
        statistics = UnitStatistics()
        writer.publish(
            unit, encoded_tables(encoder, shared, tokens, statistics), statistics=statistics
        )
    writer.finish()
    return pending


def start(
    corpus: Path, settings: EncoderSettings, actors: int = 1, **environment: str
) -> subprocess.Popen[str]:
    """The job in a process group of its own; the last line it prints is JSON."""
    command = [sys.executable, __file__, str(corpus), settings.model_dump_json(), str(actors)]
    root = str(Path(__file__).parents[2])
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=os.environ
        | {"PYTHONPATH": root, "LIDIT_CACHE": str(corpus.parent / "cache")}
        | environment,
    )


def run(corpus: str, settings: str, actors: str) -> None:
    from pipelines.corpus.embed import run_embed

    # a shell's background jobs inherit "ignore"
    signal.signal(signal.SIGINT, signal.default_int_handler)
    pool = PoolSettings(actors=int(actors), cpus=1)
    summary = run_embed(corpus, EncoderSettings.model_validate_json(settings), pool)
    modeling = [name for name in sys.modules if ".modeling_llama" in name]
    print(
        json.dumps(
            {"computed": summary.computed_units, "ray": "ray" in sys.modules, "modeling": modeling}
        )
    )


if __name__ == "__main__":
    run(*sys.argv[1:])
