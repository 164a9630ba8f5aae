"""States as Parquet that readers understand alone: each caption's states are a list of vectors of
one width.

pandas, Polars, DuckDB and Hugging Face datasets all give [tokens, width]. What the states are
(model, layer, instruction, fingerprint) is in each file's metadata under `lidit`; the states that
all captions share are in a file of their own beside the others.

Legend: T tokens of one caption, W width, R rows.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from lidit.errors import InputError
from lidit.store.families import TextFamily

METADATA = b"lidit"
SHARED_SUFFIX = ".shared.parquet"
FLOATS = {"float32": (pa.float32(), torch.float32), "float16": (pa.float16(), torch.float16)}


@dataclass(frozen=True)
class ParquetLayout:
    """How an export's Parquet files are laid out.

    Args:
        rows: "samples" writes a row per sample and caption, "captions" one per distinct caption of
            a unit.
        dtype: Of the states.
    """

    rows: Literal["samples", "captions"] = "samples"
    dtype: Literal["float32", "float16"] = "float32"


def state_columns(
    name: str,
    states: Sequence[torch.Tensor],
    token_ids: Sequence[Sequence[int]],
    width: int,
    dtype: str,
) -> dict[str, pa.Array]:
    """NAME_tokens, NAME_token_ids and NAME_states of R captions, from states [T, W] each."""
    kind, _ = FLOATS[dtype]
    lengths = [len(state) for state in states]
    ids = pa.array([list(row) for row in token_ids], pa.list_(pa.int32()))
    return {
        f"{name}_tokens": pa.array(lengths, pa.int32()),
        f"{name}_token_ids": ids,
        f"{name}_states": pa.ListArray.from_arrays(
            _offsets(lengths), _vectors(states, width, dtype)
        ).cast(pa.list_(pa.list_(kind, width))),
    }


def pooled_column(
    name: str, vectors: Sequence[torch.Tensor], width: int, dtype: str
) -> dict[str, pa.Array]:
    """NAME_pooled of R captions, from vectors [X] each; width: X."""
    rows = [torch.stack(list(vectors))] if vectors else []
    return {f"{name}_pooled": _vectors(rows, width, dtype)}


def _vectors(states: Sequence[torch.Tensor], width: int, dtype: str) -> pa.FixedSizeListArray:
    """All tokens' states one after the other. Raises InputError where a value does not fit the
    dtype.
    """
    kind, torch_dtype = FLOATS[dtype]
    flat = torch.cat([state.float() for state in states]) if states else torch.zeros(0, width)
    cast = flat.to(torch_dtype)
    if cast.numel() and not all(end.isfinite() for end in torch.aminmax(cast.float())):
        raise InputError(
            f"states beyond {dtype}'s largest value ({torch.finfo(torch_dtype).max:g}); "
            "export float32"
        )
    values = pa.array(cast.reshape(-1).numpy(), kind)
    return pa.FixedSizeListArray.from_arrays(values, width)


def _offsets(lengths: Sequence[int]) -> pa.Array:
    return pa.array(np.cumsum([0, *lengths], dtype=np.int32))


def family_facts(family: TextFamily) -> dict[str, Any]:
    """What a reader without the corpus needs to know of a family's states."""
    spec, encoder = family.spec, family.manifest.get("extra", {}).get("encoder", {})
    return {
        "fingerprint": family.fingerprint,
        "model": encoder.get("model"),
        "revision": encoder.get("revision"),
        "width": family.width,
        "block": spec.get("blocks"),
        "layers": spec.get("layers"),
        "join": spec.get("join", "concatenate") if spec.get("layers") else None,
        "blocks_of_the_model": spec.get("total_blocks"),
        "instruction": spec.get("instruction"),
        "computed_in": spec.get("dtype"),
        "stored_as": spec.get("storage"),
    }


def with_identity(table: pa.Table, identity: Mapping[str, Any]) -> pa.Table:
    """The table with what it holds in its metadata."""
    return table.replace_schema_metadata({METADATA: json.dumps(identity, sort_keys=True)})


def read_identity(schema: pa.Schema) -> dict[str, Any]:
    """The inverse of `with_identity`. Raises ValueError for a file that has none."""
    found = json.loads((schema.metadata or {}).get(METADATA, b"null"))
    if not isinstance(found, dict):
        raise ValueError("not a file of lidit export")
    return found


def shared_table(families: Iterable[TextFamily], dtype: str) -> pa.Table:
    """One row per family: what all its captions have in common, for guidance and for models that
    read the prefix.
    """
    kind, torch_dtype = FLOATS[dtype]
    lists = pa.list_(pa.list_(kind))
    rows = []
    for family in families:
        shared = family.shared()
        facts = family_facts(family)
        rows.append(
            {
                "family": family.name,
                **facts,
                "prefix_token_ids": list(shared.prefix_ids),
                "prefix_states": [row.numpy() for row in shared.prefix.to(torch_dtype)],
                "empty_token_ids": list(shared.empty_ids),
                "empty_states": [row.numpy() for row in shared.empty.to(torch_dtype)],
                "empty_pooled": None
                if shared.empty_pooled is None
                else shared.empty_pooled.to(torch_dtype).numpy(),
                "mean": shared.mean.float().numpy(),
                "deviation": shared.deviation.float().numpy(),
            }
        )
    schema = pa.schema(
        [
            ("family", pa.string()),
            ("fingerprint", pa.string()),
            ("model", pa.string()),
            ("revision", pa.string()),
            ("width", pa.int32()),
            ("block", pa.int32()),
            ("layers", pa.list_(pa.int32())),
            ("join", pa.string()),
            ("blocks_of_the_model", pa.int32()),
            ("instruction", pa.string()),
            ("computed_in", pa.string()),
            ("stored_as", pa.string()),
            ("prefix_token_ids", pa.list_(pa.int32())),
            ("prefix_states", lists),
            ("empty_token_ids", pa.list_(pa.int32())),
            ("empty_states", lists),
            ("empty_pooled", pa.list_(kind)),
            ("mean", pa.list_(pa.float32())),
            ("deviation", pa.list_(pa.float32())),
        ]
    )
    return pa.Table.from_pylist(rows, schema=schema)


def write_table(sink: Any, tables: Iterable[pa.Table]) -> None:
    """Write tables of one schema as the row groups of one file."""
    writer: pq.ParquetWriter | None = None
    with pa.PythonFile(sink, mode="w") as file:
        for table in tables:
            writer = writer or pq.ParquetWriter(file, table.schema, compression="zstd")
            writer.write_table(table)
        if writer is not None:
            writer.close()


def identity_of(layout: ParquetLayout, families: Sequence[TextFamily]) -> dict[str, Any]:
    """The part of an export's identity that its layout and families make."""
    return {
        **asdict(layout),
        "families": {family.name: family_facts(family) for family in families},
    }
