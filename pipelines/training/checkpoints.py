"""Checkpoints: complete or absent, checked before use, independent of ZeRO stage and world size.

    step-00001000/
      rank-00000.safetensors   this rank's fragments: master weights, both moments, EMA
                               (keys KIND|NAME|START)
      rank-00000.json          sha256 and size of the file beside it, rank 0's also of the model's;
                               written and sent last
      position.json            rank 0: step, world size, run facts (config, corpus digest, family
                               fingerprints)
      model/                   rank 0, after the last step: the folder people load

No pickle is written or read. DeepSpeed's own checkpoints are pickles that load only at the world
size and stage they were written with; these are plain tensors named by parameter and offset.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from lidit.errors import InputError, one_line
from lidit.store import digest_of
from pipelines.training.ema import (
    MOMENTS,
    ShardedEMA,
    inner_optimizer,
    load_numbers,
    owned_fragments,
)

log = logging.getLogger(__name__)
NAME = re.compile(r"step-(\d{9})$")
T = TypeVar("T")
MODEL = "model"
POSITION = "position.json"
# What reading a damaged JSON file of a checkpoint raises; RecursionError for brackets without end.
DAMAGE = (OSError, ValueError, LookupError, TypeError, RecursionError)


def unsent_prefix(run_folder: Path) -> str:
    """Prefix of the temporary folders that keep this run's checkpoints until they are uploaded."""
    return f"lidit-checkpoint-{digest_of(str(run_folder))[:16]}-"


def checkpoint_name(step: int) -> str:
    return f"step-{step:09}"


@dataclass(frozen=True)
class Position:
    """Where a run stands. The data order needs nothing but the step.

    `ema_updates` counts the steps that were taken: fewer than `step` where some had no finite
    loss. `start` names the start of the workers that wrote the checkpoint.
    """

    step: int
    world_size: int
    ema_updates: int
    facts: dict[str, Any]
    start: str = ""


def save(folder: Path, engine: Any, ema: ShardedEMA, rank: int, position: Position) -> None:
    """Write this rank's part of a checkpoint into `folder`; every rank calls it, rank 0 with the
    model in its place.
    """
    optimizer = inner_optimizer(engine)
    tensors: dict[str, torch.Tensor] = {}
    for fragment, average in zip(owned_fragments(engine), ema.average):
        place = f"{fragment.name}|{fragment.start}"
        tensors[f"master|{place}"] = fragment.master
        tensors[f"ema|{place}"] = average
        # there are none before the first step that is taken
        for kind in MOMENTS if position.ema_updates else ():
            tensors[f"{kind}|{place}"] = fragment.moment(optimizer, kind)
    path = folder / f"rank-{rank:05}.safetensors"
    save_file(
        {
            key: value.detach().to("cpu", torch.float32).contiguous().clone()
            for key, value in tensors.items()
        },
        path,
    )
    if rank == 0:
        text = json.dumps(position.__dict__, indent=1, sort_keys=True)
        (folder / POSITION).write_text(text)
    write_record(folder, rank, position)


def write_record(folder: Path, rank: int, position: Position) -> None:
    """Write size and sha256 of this rank's files; last, so a record means complete files."""
    files = [folder / f"rank-{rank:05}.safetensors"]
    if rank == 0:
        files += [
            folder / POSITION,
            *(path for path in sorted((folder / MODEL).rglob("*")) if path.is_file()),
        ]
    entries = [
        {"file": str(p.relative_to(folder)), "bytes": p.stat().st_size, "sha256": _digest(p)}
        for p in files
    ]
    record = {"start": position.start, "files": entries}
    (folder / f"rank-{rank:05}.json").write_text(json.dumps(record))


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def send(folder: Path, rank: int, persist: Callable[[Path], T]) -> T:
    """Persist a rank's part: its files, then the record of them; what `persist` gave last.

    Copying is not atomic and takes files in any order: a record that is there means that all it
    names had arrived, so a part that is short later is damage and not a copy that was cut off.
    """
    of_record = Path(tempfile.mkdtemp(prefix=f"{folder.name}-record-", dir=folder.parent))
    try:
        record = folder / f"rank-{rank:05}.json"
        record.rename(of_record / record.name)
        persist(folder)
        return persist(of_record)
    finally:
        shutil.rmtree(of_record, ignore_errors=True)


def problem(folder: Path) -> str | None:
    """Why a checkpoint folder cannot be used; None when every file is there, matches its record and
    is of one start.
    """
    try:
        position = read_position(folder)
        # One flipped bit of the step would go on elsewhere in the data with these weights.
        if checkpoint_name(position.step) != folder.name:
            return f"{POSITION} is of step {position.step}"
        for rank in range(position.world_size):
            record = _record(folder, rank)
            if record["start"] != position.start:
                return f"rank {rank}'s part is of another start of the workers than rank 0's"
            if record["files"][0]["file"] != f"rank-{rank:05}.safetensors":
                return f"rank-{rank:05}.json is the record of another rank's part"
            for entry in record["files"]:
                path = folder / entry["file"]
                if path.stat().st_size != entry["bytes"] or _digest(path) != entry["sha256"]:
                    return f"{entry['file']} does not match its record"
    except DAMAGE as error:
        return one_line(error)
    return None


def unfinished(folder: Path) -> bool:
    """Whether the run was stopped while it wrote this: a file is missing, or of another start.

    A file that is too short does not count: it may have been whole once, which makes it damage.
    """
    try:
        position = read_position(folder)
        for record in (_record(folder, rank) for rank in range(position.world_size)):
            missing = [entry for entry in record["files"] if not (folder / entry["file"]).exists()]
            if record["start"] != position.start or missing:
                return True
    except DAMAGE:
        return True
    return False


def _record(folder: Path, rank: int) -> dict[str, Any]:
    """The record of a rank's files; checkpoints of earlier versions name one file and no start."""
    record = json.loads((folder / f"rank-{rank:05}.json").read_text())
    return record if "files" in record else {"start": "", "files": [record]}


def read_position(folder: Path) -> Position:
    return Position(**json.loads((folder / POSITION).read_text()))


def candidates(root: Path) -> list[Path]:
    """Checkpoint folders below a run's folder, newest first."""
    if not root.is_dir():
        return []
    return sorted(
        (p for p in root.iterdir() if NAME.search(p.name)), key=lambda p: p.name, reverse=True
    )


def newest_complete(root: Path) -> Path | None:
    """The newest checkpoint that passes every check; damaged ones are logged and passed over.

    None where no checkpoint was ever finished. Raises InputError where finished checkpoints are
    all damaged: starting over silently would throw work away.
    """
    folders = candidates(root)
    # Looked at first: workers of an earlier start may still be sending the rest of theirs.
    never_finished = all(map(unfinished, folders))
    for folder in folders:
        if (reason := problem(folder)) is None:
            return folder
        log.warning(
            "checkpoint %s is not usable (%s): falling back to the one before", folder.name, reason
        )
    if not never_finished:
        raise InputError(
            f"{root}: no checkpoint is whole; remove the step-* folders to start the run over"
        )
    return None


class CheckpointReader:
    """Reads parts of parameters out of one checkpoint, from the fragments of all its ranks."""

    def __init__(self, folder: Path) -> None:
        self.position = read_position(folder)
        self.places: dict[tuple[str, str], list[tuple[int, int, Any, str]]] = {}
        for rank in range(self.position.world_size):
            file = safe_open(folder / f"rank-{rank:05}.safetensors", framework="pt")
            for key in file.keys():  # noqa: SIM118 (not a dict)
                kind, name, start = key.split("|")
                (length,) = file.get_slice(key).get_shape()
                self.places.setdefault((kind, name), []).append(
                    (int(start), int(start) + length, file, key)
                )

    def read(self, kind: str, name: str, first: int, last: int) -> torch.Tensor:
        """Elements [first, last) of a parameter's flat fp32 tensor; KeyError for an
        unknown name.
        """
        pieces = []
        for start, stop, file, key in sorted(self.places[kind, name], key=lambda piece: piece[0]):
            low, high = max(first, start), min(last, stop)
            if low < high:
                pieces.append(file.get_slice(key)[low - start : high - start])
        return torch.cat(pieces)

    def restore(self, engine: Any, ema: ShardedEMA) -> Position:
        load_numbers(engine, ema, self.read, self.position.ema_updates)
        ema.updates = self.position.ema_updates
        return self.position
