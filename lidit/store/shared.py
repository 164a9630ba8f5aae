"""What all captions of a text family share: `shared.arrow`, and for coded families the code.

Legend: P tokens of the instruction, T of the empty caption, W width, S symbols.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from lidit.errors import InputError, JobError
from lidit.store.coding.rans import Model
from lidit.store.coding.transform import CodeQuality, StateCode
from lidit.store.schema import read_metadata, with_metadata

SHARED_ROLES = ("prefix", "empty", "mean", "deviation")
POOLED_ROLE = "empty_pooled"  # only in families with pooled vectors
CODE_ROLES = ("basis", "step", "frequencies")  # only in coded families


@dataclass(frozen=True)
class SharedStates:
    """What all captions of a text family have in common.

    Args:
        prefix: [P, W] in the compute dtype: states of the instruction.
        empty: [T, W] in the compute dtype: states of the empty caption.
        mean: [W] float32, of each channel over a sample of captions.
        deviation: [W] float32, likewise.
        prefix_ids: The P token ids of the instruction.
        empty_ids: The T token ids of the empty caption.
        sha256: Of the file they came from, which every unit's record repeats.
        empty_pooled: [X] float32, the empty caption's vector in families with pooled vectors.
        code: What states are coded with, in families of storage coded.
    """

    prefix: torch.Tensor
    empty: torch.Tensor
    mean: torch.Tensor
    deviation: torch.Tensor
    prefix_ids: tuple[int, ...]
    empty_ids: tuple[int, ...]
    sha256: str
    empty_pooled: torch.Tensor | None = None
    code: StateCode | None = None


def shared_table(
    prefix_ids: Sequence[int],
    prefix: torch.Tensor,
    empty_ids: Sequence[int],
    empty: torch.Tensor,
    mean: torch.Tensor,
    deviation: torch.Tensor,
) -> pa.Table:
    """`shared.arrow`: prefix [P, W] and empty [T, W] exactly as computed, mean and deviation [W].

    Values are float32, which holds every bfloat16 exactly, so mean and deviation keep their
    precision; the compute dtype is in the metadata. Raises JobError where a value is not finite.
    """
    compute = str(prefix.dtype).removeprefix("torch.")
    width = mean.shape[0]
    rows = {"prefix": prefix, "empty": empty, "mean": mean[None], "deviation": deviation[None]}
    for role, value in rows.items():
        if value.ndim != 2 or value.shape[1] != width or not torch.isfinite(value).all():
            raise JobError(
                f"{role} states: shape {list(value.shape)} at width {width}, or not finite"
            )
    ids = [list(prefix_ids), list(empty_ids), [], []]
    columns = [
        pa.array(list(rows)),
        pa.array([len(value) for value in rows.values()], pa.int32()),
        pa.array(ids, pa.list_(pa.int32())),
        pa.array(
            [v.detach().cpu().float().reshape(-1).numpy() for v in rows.values()],
            pa.large_list(pa.float32()),
        ),
    ]
    schema = pa.schema(
        [
            ("role", pa.string()),
            ("tokens", pa.int32()),
            ("token_ids", pa.list_(pa.int32())),
            ("states", pa.large_list(pa.float32())),
        ]
    )
    facts = with_metadata(schema, kind="shared", storage="float32", logical=compute, width=width)
    return pa.Table.from_arrays(columns, schema=facts)


def with_empty_pooled(shared: pa.Table, pooled: torch.Tensor) -> pa.Table:
    """`shared.arrow` of a family with pooled vectors: the empty caption's, [X]."""
    return _with_roles(shared, {POOLED_ROLE: pooled.float().cpu().numpy()})


def with_code(shared: pa.Table, code: StateCode) -> pa.Table:
    """`shared.arrow` of a coded family: basis [W, W], step [1], frequencies [W, S],
    all as float32.
    """
    assert code.model is not None
    rows: dict[str, np.ndarray] = {
        "basis": code.basis.cpu().reshape(-1).numpy(),
        "step": np.array([code.step], np.float32),
        "frequencies": code.model.frequencies.astype(np.float32).reshape(-1),  # up to 4096: exact
    }
    found = _with_roles(shared, rows)
    if code.quality is None:
        return found
    facts = read_metadata(found.schema, "shared") | {"code": asdict(code.quality)}
    return found.replace_schema_metadata(with_metadata(found.schema, **facts).metadata)


def _with_roles(shared: pa.Table, rows: dict[str, np.ndarray]) -> pa.Table:
    columns: list[list[Any]] = [list(rows), [0] * len(rows), [[]] * len(rows), list(rows.values())]
    arrays = [
        pa.array(value, field.type) for value, field in zip(columns, shared.schema, strict=True)
    ]
    return pa.concat_tables([shared, pa.table(arrays, shared.schema)]).combine_chunks()


def read_shared(table: pa.Table, sha256: str, where: str) -> SharedStates:
    """The inverse of `shared_table`. InputError where a role is missing."""
    facts = read_metadata(table.schema, where)
    width, compute = facts["width"], getattr(torch, facts["logical"])
    rows = {role: i for i, role in enumerate(table["role"].to_pylist())}
    coded = "basis" in rows
    expected = {*SHARED_ROLES, *(CODE_ROLES if coded else ())}
    if set(rows) - {POOLED_ROLE} != expected:
        raise InputError(f"{where}: roles {sorted(rows)}, expected {sorted(expected)}")

    def flat(role: str) -> np.ndarray:
        found: np.ndarray = table["states"][rows[role]].values.to_numpy(zero_copy_only=False).copy()
        return found

    def tensor(role: str) -> torch.Tensor:
        return torch.from_numpy(flat(role)).view(-1, width)

    def ids(role: str) -> tuple[int, ...]:
        return tuple(table["token_ids"][rows[role]].as_py())

    pooled = flat(POOLED_ROLE) if POOLED_ROLE in rows else None
    return SharedStates(
        tensor("prefix").to(compute),
        tensor("empty").to(compute),
        tensor("mean")[0],
        tensor("deviation")[0],
        ids("prefix"),
        ids("empty"),
        sha256,
        None if pooled is None else torch.from_numpy(pooled),
        _code(facts, tensor("basis"), flat("step"), flat("frequencies")) if coded else None,
    )


def _code(
    facts: dict[str, Any], basis: torch.Tensor, step: np.ndarray, frequencies: np.ndarray
) -> StateCode:
    counts = frequencies.astype(np.uint16).reshape(len(basis), -1)  # [W, S]
    # Zeros stand behind a component's symbols: its values on either side of zero, and the escape.
    radius = ((counts > 0).sum(1) - 2) // 2
    quality = CodeQuality(**facts["code"]) if "code" in facts else None
    return StateCode(basis, float(step[0]), Model(counts, radius.astype(np.int16)), quality)
