"""What a part is given: its device, the time it has left, and where its figures go."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass
class Run:
    """One part's run. `toy`: sizes for a CPU; `ends`: on `time.monotonic`'s clock; `send`: takes a
    JSON object.
    """

    device: torch.device
    toy: bool
    ends: float
    send: Callable[[dict[str, Any]], None]

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    def left(self) -> float:
        """Seconds until the part is ended."""
        return self.ends - time.monotonic()

    def report(self, name: str, **figures: Any) -> None:
        """Figures of one measurement, printed at once: what a part has reported
        survives its end.
        """
        self.send({"name": name, **figures})

    def headline(self, text: str) -> None:
        """A few words for the last table."""
        self.send({"headline": text})

    def attempt(
        self, name: str, work: Callable[[], dict[str, Any]], needs: float = 1
    ) -> dict[str, Any] | None:
        """Reports what `work` finds, or why it found nothing; None then. Not begun with less than
        `needs` seconds.
        """
        if not self.toy and self.left() < needs:
            self.report(name, skipped=f"{self.left():.0f} s left, needs {needs:.0f}")
            return None
        began = time.monotonic()
        try:
            figures = work()
        except torch.OutOfMemoryError:
            failed = "out of memory"
        except Exception as error:  # whatever it is, the other measurements go on
            failed = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        else:
            self.report(name, **figures, took=round(time.monotonic() - began, 2))
            return figures
        # Outside the handler, where the error's frames no longer hold tensors.
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()
        self.report(name, failed=failed, took=round(time.monotonic() - began, 2))
        return None
