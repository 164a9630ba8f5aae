"""A cluster of several nodes on one machine, a corpus on S3, one `lidit run`; a node is killed in
each stage.

`python nodes_scenario.py FOLDER`: FOLDER holds scenes/, the LLMs llama/ and qwen2/, and
recipe.yaml. Prints JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from tests.helpers.s3_server import s3_server
from tests.helpers.waiting import wait_until

# What each kind of node has; the head has nothing, as on a real cluster, and is where the driver
# runs.
KINDS = {
    "reader": {"num_cpus": 2},
    "small": {"num_cpus": 1, "resources": {"small": 1}},
    "large": {"num_cpus": 1, "resources": {"large": 1}},
    "codec": {"num_cpus": 1, "resources": {"codec": 1}},
    "trainer": {"num_cpus": 1, "resources": {"trainer": 1}},
}
OVERRIDES = (
    "sources=[s3://data/scenes]",
    "corpus=s3://data/corpus",
    "output=cluster-runs",
    "pools={llama: {resources: {small: 1}}, qwen2: {resources: {large: 1}}}",
    "pool={resources: {codec: 1}}",
    "engine.resources={trainer: 1}",
)
STAGE_SECONDS = 600


def main(folder: Path) -> None:
    temporary = folder / "t"
    temporary.mkdir()
    os.environ |= {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": "token-of-the-test-59c1",
        "RAY_TMPDIR": str(temporary),
    }
    with s3_server() as environment:
        os.environ.update(environment)
        print(json.dumps(scenario(folder)))


def scenario(folder: Path) -> dict[str, object]:
    import fsspec
    from ray.cluster_utils import Cluster

    files, _ = fsspec.core.url_to_fs("s3://data/", use_listings_cache=False)
    files.put(str(folder / "scenes") + "/", "data/scenes/", recursive=True)
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False}
    )
    nodes = {kind: cluster.add_node(**offers) for kind, offers in KINDS.items()}
    cluster.add_node(**KINDS["trainer"])
    cluster.wait_for_nodes()
    run = folder / "cluster-runs" / "nodes"
    with (folder / "driver.log").open("w") as log:
        driver = subprocess.Popen(
            [Path(sys.executable).with_name("lidit"), "run", "recipe.yaml", *OVERRIDES, "--until",
             "train"],
            cwd=folder, env=os.environ | {"RAY_ADDRESS": cluster.address}, stdout=log, stderr=log,
        )  # fmt: skip

        def log_end() -> str:
            return (folder / "driver.log").read_text()[-4000:]

        def kill(
            kind: str, begun: Callable[[], object], ended: Callable[[], object]
        ) -> dict[str, bool]:
            """Kill the node of this kind once the stage has begun, and bring another
            in its place.
            """
            wait_until(begun, STAGE_SECONDS, lambda: None if driver.poll() is None else log_end())
            cluster.remove_node(nodes[kind], allow_graceful=False)
            in_the_middle = not ended()
            nodes[kind] = cluster.add_node(**KINDS[kind])
            return {"in_the_middle": in_the_middle}

        def found(pattern: str) -> list[str]:
            return list(files.glob(f"data/corpus/{pattern}"))

        killed = {
            "ingest": kill("reader", lambda: found("ingest/*.arrow"), lambda: found("corpus.json")),
            "embed": kill(
                "large",
                lambda: found("text/qwen2-*/0*.json"),
                lambda: found("text/qwen2-*/MANIFEST.json"),
            ),
            "latents": kill(
                "codec",
                lambda: found("latents/*/0*.json"),
                lambda: found("latents/*/MANIFEST.json"),
            ),
            "train": kill(
                "trainer",
                lambda: list(run.glob("step-*/position.json")),
                lambda: (run / "model" / "finished.json").exists(),
            ),
        }
        code = driver.wait(timeout=STAGE_SECONDS)
    return {
        "code": code,
        "killed": killed,
        "log": (folder / "driver.log").read_text()[-4000:],
        **results(run),
    }


def results(run: Path) -> dict[str, object]:
    from lidit.store import Corpus
    from lidit.store.verify import verify_corpus

    corpus = Corpus.open("s3://data/corpus")
    return {
        "sound": verify_corpus("s3://data/corpus", deep=True).sound,
        "corpus": corpus.digest,
        "text": {name: corpus.text_family(name).digest for name in ("llama", "qwen2")},
        "latents": corpus.latent_family("pixels").digest,
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]))
