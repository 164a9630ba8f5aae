"""Meeting Ray: what an embedded cluster lacks is said before anything waits for it."""

import re

import pytest

from lidit.config import PoolSettings
from lidit.errors import InputError
from pipelines.runtime import joined, resources

pytestmark = pytest.mark.usefixtures("ray_cluster")


def test_a_running_ray_that_is_too_small_is_named(caplog: pytest.LogCaptureFixture) -> None:
    offered = int(resources.total("CPU"))
    resources.connect(offered)
    assert caplog.text == ""
    resources.connect(offered + 1)
    assert (
        f"Ray already runs in this process with {offered} logical CPUs, this job asks for "
        f"{offered + 1}" in caplog.text
    )
    assert resources.total("CPU") == offered


def test_a_cluster_may_grow_and_is_not_measured(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    offered = resources.total("CPU")
    with pytest.raises(InputError, match="999 actors ask for 999 CPU"):
        resources.check_resources(PoolSettings(actors=999))
    encoders = [PoolSettings(actors=3, cpus=offered / 4) for _ in range(2)]
    resources.check_together(encoders[:1], "encoders")
    with pytest.raises(InputError, match="encoders and training beside each other ask for"):
        resources.check_together(encoders, "encoders and training")
    monkeypatch.setenv(resources.CLUSTER_ADDRESS, "auto")
    resources.connect(999)
    resources.check_resources(PoolSettings(actors=999))
    resources.check_together(encoders, "encoders and training")
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("127.0.0.1:1", "nobody answers ([Errno 111] Connection refused); start the cluster"),
        ("127.0.0.1:70000", "is no host:port"),
        ("nonsense", "is no host:port"),
        (
            "ray://127.0.0.1:10001",
            "a job runs inside its cluster; give the head's host:port (6379)",
        ),
    ],
)
def test_an_address_at_which_no_cluster_is_is_refused_at_once(
    address: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(joined, "BETWEEN", 0.01)
    with pytest.raises(InputError, match=f"^RAY_ADDRESS={re.escape(address)}: {re.escape(reason)}"):
        joined.join(address)
