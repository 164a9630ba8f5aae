"""Dashboard and alert rules speak only of metrics we declare, the rules fire on real series, and a
job exports them.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from infra.kuberay.documents import cluster_spec, pod_templates
from lidit.config import Recipe
from lidit.datasets.scenes.shards import SceneSet, write_scene_shards
from lidit.store import Corpus
from pipelines.runtime.prometheus import METRICS
from tests.helpers.manifests import REPOSITORY, Network, render_overlay, selects
from tests.helpers.pictures import write_tar
from tests.helpers.tiny_models import tiny_llm

MONITORING = REPOSITORY / "infra" / "monitoring"
OURS = re.compile(r"\bray_(lidit_\w+)")
# Metrics of a served model begin with these, all others are those of a job.
SERVED = (
    "lidit_request", "lidit_first_preview", "lidit_queue", "lidit_pass", "lidit_unused",
    "lidit_prompt_states",
    "lidit_verdicts",
)  # fmt: skip
HISTOGRAM_SUFFIXES = ("_bucket", "_count", "_sum")


def panels() -> list[dict[str, Any]]:
    return [
        p
        for p in json.loads((MONITORING / "dashboard.json").read_text())["panels"]
        if p["type"] != "row"
    ]


def rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load((MONITORING / "alerts.yaml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def expressions() -> dict[str, str]:
    found = {f"panel {p['title']} {t['refId']}": t["expr"] for p in panels() for t in p["targets"]}
    return found | {f"alert {rule['alert']}": rule["expr"] for rule in rules()}


def exported_names() -> set[str]:
    """The series names Ray makes of our declarations."""
    names: set[str] = set()
    for name, declared in METRICS.items():
        names |= (
            {name + suffix for suffix in HISTOGRAM_SUFFIXES}
            if declared.kind == "histogram"
            else {name}
        )
    return names


def test_every_metric_named_is_declared_with_its_label() -> None:
    for where, expression in expressions().items():
        named = OURS.findall(expression)
        assert named, f"{where} watches nothing of ours"
        for name in named:
            assert name in exported_names(), (
                f"{where} names {name}, which pipelines/runtime/prometheus.py does not declare"
            )
            base = name if name in METRICS else name.rsplit("_", 1)[0]
            assert METRICS[base].tag in expression, (
                f"{where}: {name} is labelled by {METRICS[base].tag}"
            )


def test_every_declared_metric_is_watched() -> None:
    watched = {name for expression in expressions().values() for name in OURS.findall(expression)}
    for name in METRICS:
        assert {name, *(name + suffix for suffix in HISTOGRAM_SUFFIXES)} & watched, (
            f"nobody looks at {name}"
        )


def test_counters_end_in_total_as_ray_exports_them() -> None:
    for name, declared in METRICS.items():
        assert name.startswith("lidit_")
        assert name.endswith("_total") == (declared.kind == "counter")


def test_the_dashboard_is_well_formed() -> None:
    dashboard = json.loads((MONITORING / "dashboard.json").read_text())
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(set(ids)) == len(ids)
    cells = [
        (panel["gridPos"]["x"] + x, panel["gridPos"]["y"] + y)
        for panel in dashboard["panels"]
        for x in range(panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["h"])
    ]
    assert len(set(cells)) == len(cells), "two panels overlap"
    variables = {variable["name"] for variable in dashboard["templating"]["list"]}
    for panel in panels():
        for target in panel["targets"]:
            used = set(re.findall(r"\$\{?(\w+)", target["expr"] + target["datasource"]["uid"]))
            assert used <= variables


def test_every_alert_says_what_to_do() -> None:
    wanted = {
        "LiditEmbeddingStalled",
        "LiditLossNotFinite",
        "LiditCheckpointTooOld",
        "LiditQuarantineAboveThreshold",
    }
    assert wanted <= {rule["alert"] for rule in rules()}
    for rule in rules():
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert set(rule["annotations"]) == {"summary", "remedy"}


@pytest.fixture
def promtool() -> str:
    path = shutil.which("promtool")
    if path is None:
        pytest.skip("no promtool here (Debian: apt-get install prometheus)")
    return path


def test_alerts_fire_when_they_should_and_only_then(promtool: str) -> None:
    done = subprocess.run(
        [promtool, "test", "rules", "alerts_test.yaml"],
        cwd=MONITORING,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    tested = {
        case["alertname"]
        for test in yaml.safe_load((MONITORING / "alerts_test.yaml").read_text())["tests"]
        for case in test["alert_rule_test"]
    }
    assert tested == {rule["alert"] for rule in rules()}


def test_the_podmonitor_finds_every_ray_pod_and_may_reach_it() -> None:
    """Its selectors and its port, against the pods as the manifests make them and KubeRay labels
    them.
    """
    monitor = yaml.safe_load((MONITORING / "podmonitor.yaml").read_text())
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    documents = render_overlay("large")
    network = Network(documents)
    seen = 0
    for document in documents:
        for where, template in pod_templates(document) if cluster_spec(document) else ():
            labels = template["metadata"]["labels"]
            if where == "submitter":
                assert not selects(monitor["spec"]["selector"], labels)
                continue
            labels |= {"ray.io/node-type": "head" if where == "head" else "worker"}
            ports = {
                port["name"]: port["containerPort"]
                for port in template["spec"]["containers"][0]["ports"]
            }
            assert selects(monitor["spec"]["selector"], labels)
            assert (
                document["metadata"]["namespace"]
                in monitor["spec"]["namespaceSelector"]["matchNames"]
            )
            space = monitor["metadata"]["namespace"]
            assert network.allows(
                {"app": "prometheus"}, labels, ports[endpoint["port"]], space, "lidit"
            ), where
            seen += 1
    assert seen == 12


def test_the_scrape_configuration_is_valid(promtool: str) -> None:
    command = [promtool, "check", "config", str(MONITORING / "prometheus.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_remedies_name_settings_that_exist() -> None:
    page = (REPOSITORY / "docs" / "monitoring.md").read_text()
    (remedy,) = [
        rule["annotations"]["remedy"] for rule in rules() if rule["alert"] == "LiditWaitingForData"
    ]
    for text in (page, *(rule["annotations"]["remedy"] for rule in rules())):
        for section, key in re.findall(r"\b(data|engine|train)\.([a-z_]+)", text):
            assert key in Recipe.model_fields[section].annotation.model_fields, f"{section}.{key}"  # type: ignore[union-attr]
    assert "data.prefetch_batches" in remedy
    assert "LIDIT_STORE_CACHE_GIGABYTES" in remedy


def test_panel_expressions_parse(promtool: str, tmp_path: Path) -> None:
    records = [
        {"record": f"panel:{i}", "expr": expression.replace("$encoder", ".*").replace("$run", ".*")}
        for i, expression in enumerate(t["expr"] for p in panels() for t in p["targets"])
    ]
    path = tmp_path / "panels.yaml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": records}]}))
    done = subprocess.run(
        [promtool, "check", "rules", str(path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_without_ray_nothing_happens() -> None:
    code = (
        "from pipelines.runtime.prometheus import EmbedMetrics, TrainMetrics, _metric\n"
        "EmbedMetrics('a').unit_done(1, 2, 3, 4.0, 5)\n"
        "TrainMetrics('b').step(1.0, 0.1, float('nan'))\n"
        "assert _metric.cache_info().currsize == 0\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True)


JOB = """
import sys, threading, urllib.request
import ray
from tests.helpers.waiting import wait_until
from pipelines.runtime.prometheus import (
    EmbedMetrics, EngineMetrics, IngestMetrics, RequestMetrics, TrainMetrics, judged
)

ray.init(num_cpus=2, include_dashboard=True, dashboard_port=0, _temp_dir=sys.argv[1], logging_level=40)

@ray.remote
def train():
    metrics = TrainMetrics("run-1")
    metrics.step(seconds=0.3, data_wait_seconds=0.06, loss=1.5, mfu=0.4)
    metrics.step(seconds=0.5, data_wait_seconds=0.14, loss=float("nan"))
    metrics.not_finite()
    metrics.checkpoint_saved(1.0e9)
    threading.Event().wait()  # a worker that is gone takes its series with it: this one stays as long as the driver

running = train.remote()
metrics = EmbedMetrics("smollm2")
metrics.units_left(10)
metrics.unit_done(captions=5, tokens=45, padded_tokens=60, seconds=2.0, left=9)
metrics.unit_done(captions=5, tokens=45, padded_tokens=50, seconds=2.0, left=8)
metrics.rolling(ahead=1, wanted_actors=3, on_disk=40)
IngestMetrics("pictures").source_read(kept=7, refused=2)
requests, engine = RequestMetrics("demo"), EngineMetrics("demo")
requests.queue(5000)
requests.ended("drawn", "32x32", 0.4, unused_steps=3)
requests.previewed(0.1)
engine.passed("32x32", rows=8, seconds=0.02)
engine.passed("32x32", rows=6, seconds=0.01)
engine.prompt_states(hits=3, misses=1)
judged("words", "refused", 2)
node = ray.nodes()[0]
url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"

def everything():
    text = urllib.request.urlopen(url).read().decode()
    return text if text.count("# HELP ray_lidit_") == int(sys.argv[2]) else None

print(wait_until(everything, 60, every=1))  # the agent exports once a second
"""  # noqa: E501


def scraped(text: str) -> dict[str, tuple[str, float]]:
    """Name -> labels and value of every series of ours; the last one where there are several."""
    samples = {}
    for line in text.splitlines():
        if line.startswith("ray_lidit_"):
            series, value = line.rsplit(" ", 1)
            name, labels = series.split("{", 1)
            samples[name.removeprefix("ray_")] = (labels, float(value))
    return samples


@pytest.mark.slow
def test_a_running_job_exports_every_metric_the_panels_and_rules_name(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    home = tmp_path_factory.mktemp("m")
    env = os.environ | {
        "HOME": str(home),
        "RAY_metrics_report_interval_ms": "1000",
        "RAY_AUTH_MODE": "disabled",
    }
    env["PYTHONPATH"] = str(REPOSITORY)
    done = subprocess.run(
        [sys.executable, "-c", JOB, str(home / "r"), str(len(METRICS))],
        env=env,
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    samples = scraped(done.stdout)
    assert set(samples) == exported_names()
    for expression in expressions().values():
        assert set(OURS.findall(expression)) <= set(samples)
    values = {name: value for name, (_, value) in samples.items()}
    assert values["lidit_captions_total"] == 10
    assert values["lidit_tokens_total"] == 90
    assert values["lidit_padding_waste_ratio"] == pytest.approx(0.1)
    assert values["lidit_units_done_total"] == 2
    assert values["lidit_units_left"] == 8
    assert values["lidit_online_wanted_actors"] == 3
    assert values["lidit_quarantined_rows_total"] == 2
    assert values["lidit_ingested_rows_total"] == 7
    assert values["lidit_step_seconds_count"] == 2
    assert values["lidit_train_seconds_total"] == pytest.approx(0.8)
    assert values["lidit_data_wait_seconds_total"] == pytest.approx(0.2)
    assert values["lidit_loss"] == 1.5
    assert values["lidit_loss_nonfinite_total"] == 1
    assert values["lidit_last_checkpoint_timestamp_seconds"] == 1.0e9
    assert (values["lidit_passes_total"], values["lidit_pass_rows_total"]) == (2, 14)
    assert values["lidit_pass_seconds_count"] == 2
    assert 'size="32x32"' in samples["lidit_pass_seconds_count"][0]
    assert 'verdict="words refused"' in samples["lidit_verdicts_total"][0]
    assert values["lidit_unused_steps_total"] == 3
    assert 'encoder="smollm2"' in samples["lidit_captions_total"][0]
    assert 'run="run-1"' in samples["lidit_loss"][0]


REAL = """
import sys, threading, urllib.request
from pathlib import Path
import ray
from lidit.config.shipped import load_recipe
from pipelines.chain import run_chain

folder = Path(sys.argv[1])
ray.init(num_cpus=4, include_dashboard=True, dashboard_port=0, _temp_dir=str(folder / "r"), logging_level=40)
node = ray.nodes()[0]
url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"

ended = threading.Event()

def watch():
    while not ended.wait(0.5):  # twice as often as the agent exports: nothing is missed
        text = urllib.request.urlopen(url).read().decode()
        print("\\n".join(line for line in text.splitlines() if line.startswith("ray_lidit_")), flush=True)

watcher = threading.Thread(target=watch)
watcher.start()
try:
    run_chain(load_recipe(str(folder / "recipe.yaml")), lambda stage, summary: None, until="train")
    watcher.join(5)  # the last values are exported a second after the job ends
finally:
    ended.set()
"""  # noqa: E501
REAL_RECIPE = """
name: watched
output: {folder}/runs
corpus: {folder}/corpus
sources: [{folder}/sources]
ingest: {{resolution: 32, bucket_multiple: 8, unit_samples: 10}}
encoders: [{{name: llama, model: {folder}/llama}}]
model: {{width: 32, depth: 1, heads: 2, patch_size: 8, refiner: {{depth: 1}}}}
objective: {{kind: clean, timesteps: uniform}}
train: {{steps: 400, batch_size: 12, checkpoint_every: 50}}
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_real_embedding_and_training_are_seen(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("w")
    write_scene_shards(folder / "sources", SceneSet(40, 32, seed=1))
    write_tar(folder / "sources" / "bad.tar", [("x.png", b"no image"), ("x.txt", b"a caption")])
    tiny_llm(folder / "llama", "llama")
    (folder / "recipe.yaml").write_text(REAL_RECIPE.format(folder=folder))
    env = os.environ | {
        "HOME": str(folder),
        "RAY_metrics_report_interval_ms": "500",
        "RAY_AUTH_MODE": "disabled",
    }
    env |= {"PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [sys.executable, "-c", REAL, str(folder)],
        env=env,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    samples = scraped(done.stdout)
    # No card, so no utilisation of one; and every loss was finite.
    served = {name for name in exported_names() if name.startswith(SERVED)}
    assert set(samples) == exported_names() - served - {"lidit_mfu", "lidit_loss_nonfinite_total"}
    values = {name: value for name, (_, value) in samples.items()}
    corpus = Corpus.open(folder / "corpus")
    manifest = corpus.text_family("llama").manifest
    assert values["lidit_ingested_rows_total"] == corpus.num_samples == 40
    assert values["lidit_quarantined_rows_total"] == corpus.facts["totals"]["refused"] == 1
    assert values["lidit_captions_total"] == manifest["rows"]
    assert values["lidit_tokens_total"] == manifest["tokens"]
    assert values["lidit_units_done_total"] == corpus.num_units
    assert values["lidit_units_left"] == 0
    assert 0 <= values["lidit_padding_waste_ratio"] < 1
    assert values["lidit_unit_seconds_total"] == pytest.approx(manifest["seconds"])
    assert 'run="watched"' in samples["lidit_loss"][0]
    assert 0 < values["lidit_step_seconds_count"] <= 400  # the last of them die with their worker
    assert 0 < values["lidit_data_wait_seconds_total"] < values["lidit_train_seconds_total"]
    assert values["lidit_last_checkpoint_timestamp_seconds"] > 1.7e9
