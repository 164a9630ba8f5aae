"""Many calls of one function as Ray tasks, a bounded number of them at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from pipelines.runtime import resources


def in_tasks(
    function: Callable[..., Any],
    calls: Iterable[tuple[str, tuple[Any, ...]]],
    instead: Callable[..., Any] | None = None,
) -> Iterator[Any]:
    """Results as they come, with a bounded number of tasks in flight. calls: (file the call is
    about, arguments).

    instead: called here with the arguments of a task whose worker died each time.
    """
    import ray

    # A worker that dies is retried twice: bytes that kill a decoder do so every time and must not
    # loop for ever.
    task = ray.remote(num_cpus=1, max_retries=2)(function)
    limit = max(2, 2 * int(ray.cluster_resources().get("CPU", 1)))
    running: dict[Any, tuple[str, tuple[Any, ...]]] = {}
    remaining = iter(calls)
    while True:
        while len(running) < limit and (call := next(remaining, None)) is not None:
            running[task.remote(*call[1])] = call
        if not running:
            return
        (finished,), _ = ray.wait(list(running), num_returns=1)
        file, arguments = running.pop(finished)
        with resources.plain_errors(
            f"{file}: the process reading it died three times; take this file out"
        ):
            try:
                result = ray.get(finished)
            except ray.exceptions.WorkerCrashedError:
                if instead is None:
                    raise
                result = instead(*arguments)
        yield result
