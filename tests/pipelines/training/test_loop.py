"""A worker's start: after an error that would come again, none of the later ones trains."""

from typing import Any

import pytest
import ray

from lidit.errors import InputError, JobError
from pipelines.training.board import Board
from pipelines.training.loop import reports_failure


@pytest.fixture
def board(ray_cluster: None) -> Any:
    return ray.remote(num_cpus=0)(Board).remote()


@pytest.mark.parametrize("kind", [InputError, JobError])
def test_no_start_follows_an_error_that_would_come_again(board: Any, kind: type[Exception]) -> None:
    starts: list[int] = []

    @reports_failure
    def worker(config: dict[str, Any]) -> None:
        starts.append(len(starts))
        raise kind("step 3: the loss is nan")

    with pytest.raises(kind, match="loss is nan"):
        worker({"board": board})
    worker({"board": board})
    assert starts == [0]
    failure = ray.get(board.failure.remote())
    assert type(failure) is kind
    assert str(failure) == "step 3: the loss is nan"


def test_a_mistake_in_code_is_told_at_the_first_start(board: Any) -> None:
    starts: list[int] = []

    @reports_failure
    def worker(config: dict[str, Any]) -> None:
        starts.append(len(starts))
        config.no_such_method()  # type: ignore[attr-defined]

    with pytest.raises(AttributeError):
        worker({"board": board})
    worker({"board": board})
    assert starts == [0]
    failure = str(ray.get(board.failure.remote()))
    assert "test_loop.py, line " in failure
    assert "AttributeError: 'dict' object has no attribute 'no_such_method'" in failure


def test_workers_start_again_after_any_other_error(board: Any) -> None:
    starts: list[int] = []

    @reports_failure
    def worker(config: dict[str, Any]) -> None:
        starts.append(len(starts))
        if len(starts) == 1:
            raise ConnectionError("a peer is gone")

    with pytest.raises(ConnectionError):
        worker({"board": board})
    worker({"board": board})
    assert starts == [0, 1]
    assert ray.get(board.failure.remote()) is None
