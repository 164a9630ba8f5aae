"""Batches on a GPU before they are asked for: copied from pinned memory while the step before them
runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

import torch

Batch = TypeVar("Batch")


def with_tensors(batch: Batch, change: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
    """A batch (a dataclass; mappings and dataclasses in it) with every tensor changed."""
    changed: Any = batch
    if isinstance(batch, torch.Tensor):
        changed = change(batch)
    elif isinstance(batch, Mapping):
        changed = {name: with_tensors(value, change) for name, value in batch.items()}
    elif is_dataclass(batch) and not isinstance(batch, type):
        values = {
            field.name: with_tensors(getattr(batch, field.name), change) for field in fields(batch)
        }
        changed = replace(batch, **values)
    return changed


def copied_ahead(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """Batches of pinned tensors on a GPU, each copied on a stream of its own while its forerunner
    is worked on. (A CPU's streams are there for tests and do nothing.)

    A batch more than the one in use is on the GPU.
    """
    streams = torch.get_device_module(device)
    stream = streams.Stream() if device.type == "cpu" else streams.Stream(device)
    last: tuple[Batch, Any] | None = None
    for batch in batches:
        with streams.stream(stream):
            copied = with_tensors(batch, lambda tensor: tensor.to(device, non_blocking=True))
            upcoming = copied, stream.record_event()
        if last is not None:
            yield _arrived(*last, streams.current_stream())
        last = upcoming
    if last is not None:
        yield _arrived(*last, streams.current_stream())


def _arrived(batch: Batch, copied: Any, current: Any) -> Batch:
    """A batch that the `current` stream may use: its kernels wait for the copy, the
    program does not.
    """
    current.wait_event(copied)

    def used_here(tensor: torch.Tensor) -> torch.Tensor:
        # else its memory could be another copy's before this stream is done with it
        if tensor.device.type != "cpu":
            tensor.record_stream(current)
        return tensor

    return with_tensors(batch, used_here)
