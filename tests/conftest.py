"""One Ray cluster for the whole session; environment set before anything imports torch or ray."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

os.environ.update(
    {
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
        # two halves of the suite share the processors
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "300",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "False",
        "HF_HUB_OFFLINE": "1",
        "MPLBACKEND": "Agg",
        "COLUMNS": "160",
    }
)

import pytest

from tests.helpers.trained import SmallWorld, make_small_world

SHARED_DATA = Path(__file__).parents[1].parent / "shared" / "data"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that need the session's Ray are one half of `make test`: only one process then starts
    it.
    """
    for item in items:
        if isinstance(item, pytest.Function) and "ray_cluster" in item.fixturenames:
            item.add_marker("cluster")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Prompt lists of public benchmarks and resource schemas, where a checkout has
    them beside it.
    """
    if not SHARED_DATA.is_dir():
        pytest.skip("no shared/data beside this checkout: the public prompt lists are not here")
    return SHARED_DATA


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """An embedded Ray with 6 logical CPUs, the same start-up code the jobs use."""
    import ray

    from pipelines.runtime.resources import connect

    with tempfile.TemporaryDirectory(prefix="ray-") as folder:
        connect(cpus=6, temp_dir=folder)
        yield
        ray.shutdown()


@pytest.fixture(scope="session")
def small_world(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> SmallWorld:
    """A corpus with two tiny LLMs' states and pixels as latents; read it, never write to it."""
    return make_small_world(tmp_path_factory.mktemp("world"))
