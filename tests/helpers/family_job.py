"""Writes a whole text family whose values depend on nothing but the captions."""

import hashlib

import torch

from lidit.store import FamilyWriter, UnitStatistics, shared_table, text_table

WIDTH = 24
SPEC = {"model": "fake-states", "layer": -3, "width": WIDTH}


def states_of(caption: str) -> tuple[list[int], torch.Tensor]:
    """One token per character; channels of very different scale, as LLM states have."""
    ids = [ord(c) for c in caption]
    seed = int.from_bytes(hashlib.sha256(caption.encode()).digest()[:4], "big")
    noise = torch.randn(len(ids), WIDTH, generator=torch.Generator().manual_seed(seed))
    return ids, noise * torch.logspace(0, 3, WIDTH) + 400 * torch.arange(WIDTH)


def shared() -> object:
    mean, deviation = 400.0 * torch.arange(WIDTH), torch.logspace(0, 3, WIDTH)
    prefix, empty = states_of("describe:")[1], states_of(".")[1]
    return shared_table(list(range(len(prefix))), prefix, [46], empty, mean, deviation)


def open_writer(corpus: str, storage: str) -> FamilyWriter:
    return FamilyWriter.open_or_create(corpus, "text", "fake", SPEC | {"storage": storage})


def publish(writer: FamilyWriter, unit: int) -> None:
    common = writer.shared()
    assert common is not None
    rows = [states_of(text) for text in writer.corpus.captions(unit)["text"].to_pylist()]
    table = text_table(
        [ids for ids, _ in rows], [s for _, s in rows], writer.spec["storage"], WIDTH, common.mean, common.deviation
    )
    statistics = UnitStatistics()
    statistics.add([s for _, s in rows], table, common.mean, common.deviation, {"truncated": 0})
    writer.publish(unit, table, statistics=statistics)


def run(corpus: str, storage: str) -> list[int]:
    writer = open_writer(corpus, storage)
    writer.write_shared(shared())
    pending = writer.pending()
    for unit in pending:
        publish(writer, unit)
    writer.finish()
    return pending
