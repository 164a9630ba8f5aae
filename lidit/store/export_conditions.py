"""Stored states as arguments of public pipelines, for trainers of others: safetensors per unit, and
an index.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import save

from lidit.errors import InputError
from lidit.store.corpus import Corpus
from lidit.store.families import TextFamily

INDEX = "index.parquet"
SUFFIX = "safetensors"
COLUMNS = pa.schema(
    [
        ("file", pa.string()),
        ("row", pa.int32()),
        ("key", pa.large_string()),
        ("caption", pa.large_string()),
        ("origin", pa.string()),
    ]
)


def require_conditions(families: Sequence[TextFamily]) -> None:
    """InputError unless every family says what a pipeline calls it, and no two say the same."""
    if not families:
        raise InputError("export to diffusers: name at least one text family with --family")
    taken: dict[str, str] = {}
    for family in families:
        for name in family.negative_prompt_embeds():
            argument = name.removeprefix("negative_")
            if argument in taken:
                raise InputError(
                    f"families {taken[argument]} and {family.name} are both {argument}; export "
                    "them into two folders"
                )
            taken[argument] = family.name


def write_conditions(sink: Any, corpus: Corpus, unit: int, families: Sequence[TextFamily]) -> None:
    """One unit: for each of its captions the call's arguments, a batch of one, named ROW.ARGUMENT.

    Arguments of empty captions, for guidance, are in every file as `negative_ARGUMENT`.
    """
    tensors: dict[str, torch.Tensor] = {}
    for family in families:
        tensors.update(_named("", family.negative_prompt_embeds()))
        for row in range(len(corpus.captions(unit))):
            tensors.update(_named(f"{row:06d}.", family.prompt_embeds(unit, [row])))
    pipelines = sorted(
        {family.manifest["extra"]["encoder"]["condition"]["pipeline"] for family in families}
    )
    sink.write(save(tensors, metadata={"pipelines": ", ".join(pipelines)}))


def write_index(sink: Any, corpus: Corpus) -> None:
    """Which row of which file is each sample's caption."""
    with pq.ParquetWriter(sink, COLUMNS, compression="zstd") as writer:
        for unit in range(corpus.num_units):
            texts = corpus.captions(unit)["text"].to_pylist()
            file = f"{corpus.unit_name(unit)}.{SUFFIX}"
            rows = [
                {
                    "file": file,
                    "row": r["index"],
                    "key": s["key"],
                    "caption": texts[r["index"]],
                    "origin": r["origin"],
                }
                for s in corpus.samples(unit).to_pylist()
                for r in s["captions"]
            ]
            writer.write_table(pa.Table.from_pylist(rows, COLUMNS))


def _named(before: str, arguments: dict[str, Any]) -> dict[str, torch.Tensor]:
    """A pipeline's list of one row is that row; a mask that is not given is not stored."""
    found = {
        name: value[0] if isinstance(value, list) else value for name, value in arguments.items()
    }
    return {
        f"{before}{name}": value.contiguous() for name, value in found.items() if value is not None
    }
