"""What goes wrong in another process, as it arrives here."""

import asyncio

import grpc
import pytest
from ray.exceptions import ActorUnavailableError, RayTaskError

from pipelines.serving.errors import ApiError, queue_full
from pipelines.serving.remote import arriving


@pytest.mark.parametrize(
    ("thrown", "code"),
    [
        (queue_full(7), "queue_full"),
        (RayTaskError("draw", "", queue_full(7)), "queue_full"),
        (ActorUnavailableError("gone", None), "worker_lost"),
        (grpc.RpcError(), "worker_lost"),
        (asyncio.CancelledError(), "worker_lost"),  # by somebody else: this side still waits
        (ZeroDivisionError("a bug"), "internal_error"),
    ],
)
def test_errors_arrive_as_what_they_were(thrown: BaseException, code: str) -> None:
    async def asked() -> None:
        with arriving():
            raise thrown

    with pytest.raises(ApiError) as told:
        asyncio.run(asked())
    assert told.value.problem.code == code


def test_who_gives_up_is_not_told_of_a_lost_worker() -> None:
    async def asked() -> None:
        with arriving():
            await asyncio.sleep(60)

    async def given_up() -> None:
        task = asyncio.create_task(asked())
        await asyncio.sleep(0)
        task.cancel()
        await task

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(given_up())
