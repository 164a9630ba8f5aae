"""Encoders side by side, without a cluster: what runs together, what waits, what a failure leaves
alone.
"""

import threading
import time

import pytest

from lidit.errors import InputError, JobError
from pipelines.chain import side_by_side


def test_what_fits_runs_together_and_what_does_not_waits() -> None:
    together, alone = threading.Barrier(2, timeout=20), threading.Lock()
    overlaps: list[str] = []

    def small() -> str:
        together.wait()  # breaks unless the other small one runs now
        return "small"

    def large() -> str:
        if not alone.acquire(blocking=False):
            overlaps.append("large")
        time.sleep(0.05)  # hold the lock: one started beside this one must meet it taken
        alone.release()
        return "large"

    results: list[str] = []
    calls = {"a": small, "b": small, "c": large, "d": large, "too large": lambda: "huge"}
    demands = {
        "a": {"CPU": 2},
        "b": {"CPU": 2, "GPU": 0},
        "c": {"CPU": 3},
        "d": {"CPU": 3},
        "too large": {"CPU": 99},
    }
    side_by_side(calls, demands, {"CPU": 4}, results.append)
    assert sorted(results) == ["huge", "large", "large", "small", "small"]
    assert not overlaps


def test_a_failure_leaves_the_others_alone() -> None:
    failed = threading.Event()

    def bad() -> str:
        failed.set()
        raise JobError("the disk is full")

    def good() -> str:
        assert failed.wait(20)
        # end after the failure has been told: that thread is the scheduler's own and gives no event
        time.sleep(0.2)
        return "good"

    results: list[str] = []
    with pytest.raises(JobError, match="disk is full"):
        side_by_side({"bad": bad, "good": good, "late": good}, {n: {"CPU": 1} for n in ("bad",
                                                                                        "good",
                                                                                        "late")},
                     {"CPU": 2}, results.append)  # fmt: skip
    assert results == ["good", "good"]
    with pytest.raises(InputError):
        side_by_side({"a": _refuse}, {"a": {}}, {}, results.append)


def _refuse() -> None:
    raise InputError("no")
