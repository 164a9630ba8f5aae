"""Writes a whole text family whose values depend on nothing but the captions."""

import hashlib

import pyarrow as pa
import torch

from lidit.store import FamilyWriter, SharedStates, UnitStatistics, shared_table, text_table
from lidit.store.coding.fit import fit_code
from lidit.store.coding.transform import standardise
from lidit.store.packing import encode
from lidit.store.shared import with_code
from lidit.store.states import stored_table

WIDTH = 24
CODED_ERROR = 0.1
SPEC = {"model": "fake-states", "layer": -3, "width": WIDTH}


def states_of(caption: str) -> tuple[list[int], torch.Tensor]:
    """One token per character; channels of very different scale, as LLM states have."""
    ids = [ord(c) for c in caption]
    seed = int.from_bytes(hashlib.sha256(caption.encode()).digest()[:4], "big")
    noise = torch.randn(len(ids), WIDTH, generator=torch.Generator().manual_seed(seed))
    return ids, noise * torch.logspace(0, 3, WIDTH) + 400 * torch.arange(WIDTH)


def shared(storage: str = "int8") -> pa.Table:
    mean, deviation = 400.0 * torch.arange(WIDTH), torch.logspace(0, 3, WIDTH)
    prefix, empty = states_of("describe:")[1], states_of(".")[1]
    table = shared_table(list(range(len(prefix))), prefix, [46], empty, mean, deviation)
    if storage != "coded":
        return table
    sample = [
        standardise(states_of(f"caption {number}")[1], mean, deviation) for number in range(90)
    ]
    return with_code(table, fit_code(sample, CODED_ERROR))


def table_of(captions: list[str], storage: str, common: SharedStates) -> pa.Table:
    rows = [states_of(text) for text in captions]
    ids, states = [ids for ids, _ in rows], [s for _, s in rows]
    if storage != "coded":
        return text_table(ids, states, storage, WIDTH, common.mean, common.deviation)
    flat = torch.cat([torch.empty(0, WIDTH), *states])
    values, scale = encode(flat, storage, common.mean, common.deviation, common.code)
    return stored_table(ids, values, scale, storage, WIDTH, common.code)


def open_writer(corpus: str, storage: str) -> FamilyWriter:
    return FamilyWriter.open_or_create(corpus, "text", "fake", SPEC | {"storage": storage})


def publish(writer: FamilyWriter, unit: int) -> None:
    common = writer.shared()
    assert common is not None
    captions = writer.corpus.captions(unit)["text"].to_pylist()
    table = table_of(captions, writer.spec["storage"], common)
    statistics = UnitStatistics()
    states = [states_of(text)[1] for text in captions]
    statistics.add(states, table, common.mean, common.deviation, {"truncated": 0}, common.code)
    writer.publish(unit, table, statistics=statistics)


def run(corpus: str, storage: str) -> list[int]:
    writer = open_writer(corpus, storage)
    writer.write_shared(shared(storage))
    pending = writer.pending()
    for unit in pending:
        publish(writer, unit)
    writer.finish()
    return pending
