"""A training on two nodes, one of which is taken away for good:
`python elastic_scenario.py recipe.yaml`.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from pathlib import Path

import ray
import yaml
from ray.cluster_utils import Cluster

from lidit.config import Recipe
from pipelines.training import checkpoints
from pipelines.training.train import train
from tests.helpers.waiting import wait_until

TRAINER = {"num_cpus": 1, "resources": {"trainer": 1}}


def main(path: Path) -> None:
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "token-of-the-test-59c1"}
    recipe = Recipe.model_validate(yaml.safe_load(path.read_text()))
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False}
    )
    leaving = [cluster.add_node(**TRAINER), cluster.add_node(**TRAINER)][0]
    cluster.wait_for_nodes()
    os.environ["RAY_ADDRESS"] = cluster.address

    def take_away() -> None:
        wait_until(lambda: checkpoints.candidates(recipe.run_folder), 300)
        cluster.remove_node(leaving, allow_graceful=False)

    threading.Thread(target=take_away, daemon=True).start()
    result = train(recipe)
    workers = {
        position.step: position.world_size
        for position in map(checkpoints.read_position, checkpoints.candidates(recipe.run_folder))
    }
    print(
        json.dumps({"workers": workers, "uri": result.tracking_uri, "run": result.run_id}),
        flush=True,
    )
    ray.shutdown()  # else the driver would see its cluster die and exit with 1
    cluster.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
