"""Checkpoints: complete or absent, checked before use, independent of ZeRO stage and world size.

    step-00001000/
      rank-00000.safetensors   this rank's fragments: master weights, both moments, EMA (keys KIND|NAME|START)
      rank-00000.json          sha256 and size of the file beside it, written last
      position.json            rank 0: step, world size, run facts (config, corpus digest, family fingerprints)

No pickle is written or read. DeepSpeed's own checkpoints are pickles that load only at the world size and stage they
were written with; these are plain tensors named by parameter and offset.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from lidit.errors import InputError
from lidit.store import digest_of
from pipelines.shards import MOMENTS, ShardedEMA, inner_optimizer, load_numbers, owned_fragments

log = logging.getLogger(__name__)
NAME = re.compile(r"step-(\d{9})$")


def unsent_prefix(run_folder: Path) -> str:
    """How the folders begin in which a machine's workers of this run keep a checkpoint until it is uploaded."""
    return f"lidit-checkpoint-{digest_of(str(run_folder))[:16]}-"


def checkpoint_name(step: int) -> str:
    return f"step-{step:09}"


@dataclass(frozen=True)
class Position:
    """Where a run stands. The data order needs nothing but the step; `ema_updates` are the steps that were taken,
    fewer than `step` where some had no finite loss."""

    step: int
    world_size: int
    ema_updates: int
    facts: dict[str, Any]


def save(folder: Path, engine: Any, ema: ShardedEMA, rank: int, position: Position) -> None:
    """Write this rank's part of a checkpoint into `folder`; every rank calls it."""
    optimizer = inner_optimizer(engine)
    tensors: dict[str, torch.Tensor] = {}
    for fragment, average in zip(owned_fragments(engine), ema.average):
        place = f"{fragment.name}|{fragment.start}"
        tensors[f"master|{place}"] = fragment.master
        tensors[f"ema|{place}"] = average
        for kind in MOMENTS if position.ema_updates else ():  # there are none before the first step that is taken
            tensors[f"{kind}|{place}"] = fragment.moment(optimizer, kind)
    path = folder / f"rank-{rank:05}.safetensors"
    save_file(
        {key: value.detach().to("cpu", torch.float32).contiguous().clone() for key, value in tensors.items()}, path
    )
    if rank == 0:
        text = json.dumps(position.__dict__, indent=1, sort_keys=True)
        (folder / "position.json").write_text(text)
    record = {"file": path.name, "bytes": path.stat().st_size, "sha256": _digest(path)}
    (folder / f"rank-{rank:05}.json").write_text(json.dumps(record))


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def problem(folder: Path) -> str | None:
    """Why a checkpoint folder cannot be used; None when every rank's file is there and matches its record."""
    try:
        position = read_position(folder)
        for rank in range(position.world_size):
            record = json.loads((folder / f"rank-{rank:05}.json").read_text())
            path = folder / record["file"]
            if path.stat().st_size != record["bytes"] or _digest(path) != record["sha256"]:
                return f"{path.name} does not match its record"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return " ".join(str(error).split())
    return None


def unfinished(folder: Path) -> bool:
    """Whether a file is missing: the checkpoint was being written when the run was stopped, and never became one."""
    try:
        ranks = range(read_position(folder).world_size)
    except (OSError, ValueError, KeyError, TypeError):
        return True
    names = [f"rank-{rank:05}.{kind}" for rank in ranks for kind in ("json", "safetensors")]
    return not all((folder / name).exists() for name in names)


def read_position(folder: Path) -> Position:
    return Position(**json.loads((folder / "position.json").read_text()))


def candidates(root: Path) -> list[Path]:
    """Checkpoint folders below a run's folder, newest first."""
    if not root.is_dir():
        return []
    return sorted((p for p in root.iterdir() if NAME.search(p.name)), key=lambda p: p.name, reverse=True)


def newest_complete(root: Path) -> Path | None:
    """The newest checkpoint that passes every check; damaged ones are named and passed over.

    InputError when there are checkpoints and none is whole: starting over silently would throw work away. Not so when
    none of them was ever finished.
    """
    found = candidates(root)
    for folder in found:
        if (reason := problem(folder)) is None:
            return folder
        log.warning("checkpoint %s is not usable (%s): falling back to the one before", folder.name, reason)
    if not all(map(unfinished, found)):
        raise InputError(f"{root}: no checkpoint is whole; remove the step-* folders to start the run over")
    return None


class CheckpointReader:
    """Full tensors from the fragments of all ranks of one checkpoint."""

    def __init__(self, folder: Path) -> None:
        self.position = read_position(folder)
        self.places: dict[tuple[str, str], list[tuple[int, Any, str]]] = {}
        for rank in range(self.position.world_size):
            file = safe_open(folder / f"rank-{rank:05}.safetensors", framework="pt")
            for key in file.keys():  # noqa: SIM118 (not a dict)
                kind, name, start = key.split("|")
                self.places.setdefault((kind, name), []).append((int(start), file, key))

    def read(self, kind: str, name: str) -> torch.Tensor:
        """The flat fp32 tensor of a parameter; KeyError when the checkpoint has no such parameter."""
        pieces = sorted(self.places[kind, name], key=lambda piece: piece[0])
        return torch.cat([file.get_tensor(key) for _, file, key in pieces])

    def restore(self, engine: Any, ema: ShardedEMA) -> Position:
        load_numbers(engine, ema, self.read, self.position.ema_updates)
        ema.updates = self.position.ema_updates
        return self.position
