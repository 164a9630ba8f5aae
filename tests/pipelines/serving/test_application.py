"""The whole application on a real Ray: gateway, ledger and studios, or every stage apart. Killed,
updated, right.
"""

from __future__ import annotations

import base64
import gzip
import io
import itertools
import json
import os
import re
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from openai import OpenAI
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from PIL import Image

from lidit.pipeline import LIDiTPipeline
from pipelines.runtime.prometheus import METRICS
from tests.helpers.servers import free_ports
from tests.helpers.waiting import wait_until

ROOT = Path(__file__).parents[3]
LONG = 300  # steps of a request that is there for a while
REQUESTS = 500  # that an update may lose none of
JOINED = "import json, sys, ray; ray.init(address=sys.argv[1], log_to_driver=False); "
# Metrics of a served model begin with these.
SERVED = ("lidit_request", "lidit_first_preview", "lidit_queue", "lidit_pass", "lidit_unused",
          "lidit_prompt_states",
          "lidit_verdicts")  # fmt: skip
SETTINGS = {
    "studio": {"replicas": 2, "surge_percent": 100},
    "limits": {"steps": LONG},
    "guards": {"needed": False},
}
PROMPTS = ("a red cube", "a circle", "a green square left of the red circle")


@dataclass(frozen=True)
class Served:
    """A running `lidit serve`: the page's address, the first key, the process."""

    url: str
    key: str
    pid: int


@contextmanager
def serving(model: Path, folder: Path, *words: str, **environment: str) -> Iterator[Served]:
    """`lidit serve` as a person starts it."""
    (port,) = free_ports(1)
    command = [
        sys.executable,
        "-m",
        "jobs.serve",
        str(model),
        "--port",
        str(port),
        "--folder",
        str(folder),
        *words,
    ]
    with (folder.parent / "serve.log").open("w") as errors:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | environment,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
        try:
            told = _told(process, folder.parent / "serve.log")
            yield Served(told["page"], told["key"], process.pid)
        finally:
            process.terminate()
            assert process.wait(300) == 0, (folder.parent / "serve.log").read_text()[-3000:]


def _told(process: subprocess.Popen[str], log: Path) -> dict[str, str]:
    assert process.stdout is not None
    told: dict[str, str] = {}
    for line in process.stdout:
        name, _, value = line.strip().partition(" ")
        told[name] = value.strip()
        if name == "try":
            return told
    raise AssertionError(log.read_text()[-3000:])


def reference(model: Path) -> Callable[[str, int, int], np.ndarray]:
    pipe = LIDiTPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)

    known, alone = {}, threading.Lock()

    def drawn(prompt: str, seed: int, steps: int) -> np.ndarray:
        with alone:  # clients' threads ask for it
            if (prompt, seed, steps) not in known:
                image = pipe([prompt], seed=seed, num_inference_steps=steps).images[0]
                known[prompt, seed, steps] = np.asarray(image).astype(int)
            return known[prompt, seed, steps]

    return drawn


def pixels(text: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB")).astype(int)


def check_pictures(served: Served, own: Callable[[str, int, int], np.ndarray]) -> None:
    """Eight clients at once, each with its own words, seed and steps, get the
    pipeline's pictures.
    """
    client = OpenAI(base_url=f"{served.url}v1", api_key=served.key, max_retries=0)

    def draw(number: int) -> None:
        prompt, steps = PROMPTS[number % 3], 2 + number % 4
        answer = client.images.generate(prompt=prompt, extra_body={"seed": number, "steps": steps})
        assert answer.data is not None
        assert abs(pixels(str(answer.data[0].b64_json)) - own(prompt, number, steps)).max() <= 1

    with ThreadPoolExecutor(8) as clients:
        list(clients.map(draw, range(16)))


def call(
    served: Served, method: str, path: str, body: Any = None, **headers: str
) -> tuple[int, Any, Any]:
    request = urllib.request.Request(
        served.url + path, json.dumps(body).encode() if body else None, method=method
    )
    fields = {
        "authorization": f"Bearer {served.key}",
        "content-type": "application/json",
        **headers,
    }
    for name, value in fields.items():
        request.add_header(name.replace("_", "-"), value)
    try:
        with urllib.request.urlopen(request, timeout=600) as answer:
            return answer.status, answer.headers, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, error.headers, json.loads(error.read())


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("together", ["true", "false"])
def test_a_model_is_served_on_a_ray_of_its_own(model: Path, tmp_path: Path, together: str) -> None:
    folder, words = tmp_path / "kept", tmp_path / "words.txt"
    words.write_text("gore\n")
    changes = (f"together={together}", "limits.steps=1000", "traces=true")
    wanted = ["--words", str(words), *(word for change in changes for word in ("--set", change))]
    with (
        collecting() as (collector, spans),
        serving(
            model,
            folder,
            *wanted,
            RAY_metrics_report_interval_ms="2000",
            OTEL_EXPORTER_OTLP_ENDPOINT=collector,
        ) as served,
    ):
        check_pictures(served, reference(model))
        # Clients do not steer Serve: neither by headers nor at its own addresses.
        status, headers, _ = call(
            served, "GET", "v1/models", x_request_id="mine", x_request_timeout_seconds="0.0001"
        )
        assert status == 200
        assert headers.get_all("x-request-id")[0].startswith("req_")
        assert len(headers.get_all("x-request-id")) == 1
        assert call(served, "GET", "-/routes")[0] == 404
        assert call(served, "GET", "v1/nothing")[2]["error"]["code"] == "not_found"
        # A job ends where it is cancelled.
        _, _, job = call(
            served, "POST", "v1/jobs", {"prompt": PROMPTS[0], "steps": 1000, "partial_images": 3}
        )
        previewed = lambda: "lidit_first_preview_seconds_count" in str(scraped(served))  # noqa: E731
        wait_until(previewed, 120, every=1)
        assert call(served, "DELETE", f"v1/jobs/{job['id']}")[2]["status"] == "cancelled"
        refused = call(served, "POST", "v1/images/generations", {"prompt": "so much gore"})[2]
        assert refused["error"]["code"] == "moderation_blocked"
        status, headers, drawn = call(
            served, "POST", "v1/images/generations", {"prompt": PROMPTS[1]}
        )
        assert status == 200, drawn
        # What panels and alerts of a served model name is exported by its processes, with these
        # requests in it.
        named = {name for name in METRICS if name.startswith(SERVED)}

        def all_of_it() -> dict[str, float] | None:
            values = scraped(served)
            # a gauge that is late is left out of a scrape
            found = {_declared(series) for series in values}
            return (
                values
                if found == named and values["ray_lidit_requests_total drawn"] == 17
                else None
            )

        values = wait_until(all_of_it, 120, every=1)
        assert values["ray_lidit_verdicts_total words refused"] == 1
        assert values["ray_lidit_verdicts_total words passed"] >= 18
        assert values["ray_lidit_unused_steps_total small"] > 0
        assert (
            values["ray_lidit_pass_seconds_count 16x16"]
            == values["ray_lidit_passes_total small"]
            > 0
        )
        assert values["ray_lidit_queue_units small"] == 0  # all that joined has left
        # The request's id finds what it went through, in every process.
        number = headers["x-request-id"].removeprefix("req_")
        stages = {"guard prompts", "count tokens", "draw", "decode", "finish"}
        wait_until(lambda: stages <= spans[number], 60, every=0.5)
        assert len(spans[number]) > len(stages)  # Serve's own among them
    assert '"stopped"' in (folder / "audit.jsonl").read_text()


@contextmanager
def collecting() -> Iterator[tuple[str, dict[str, set[str]]]]:
    """A collector's address, and the names of the spans that it gets by their trace."""
    found: dict[str, set[str]] = defaultdict(set)

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            body = gzip.decompress(body) if self.headers.get("content-encoding") == "gzip" else body
            told = ExportTraceServiceRequest.FromString(body)
            for scope in (
                scope for resource in told.resource_spans for scope in resource.scope_spans
            ):
                for span in scope.spans:
                    found[span.trace_id.hex()].add(span.name)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *words: Any) -> None:
            """Nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Collector) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}", found
        server.shutdown()


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_two_studios_are_killed_updated_and_always_right(model: Path, tmp_path: Path) -> None:
    """Of a killed one's pictures each client is told to try again; an update loses no request at
    all.
    """
    folder, own = tmp_path / "kept", reference(model)
    wanted = (
        "--set",
        "studio.replicas=2",
        "--set",
        "studio.surge_percent=100",
        "--set",
        f"limits.steps={LONG}",
    )
    with serving(model, folder, *wanted) as served:
        # 1. Eight requests are drawn by both studios when one is killed.
        body = {"prompt": PROMPTS[0], "steps": LONG, "seed": 1}
        with ThreadPoolExecutor(4) as clients:
            waiting = [
                clients.submit(call, served, "POST", "v1/images/generations", body)
                for _ in range(4)
            ]
            wait_until(lambda: (folder / "audit.jsonl").read_text().count('"accepted"') == 4, 120)
            jobs = [call(served, "POST", "v1/jobs", body)[2]["id"] for _ in range(4)]
            told_of = lambda job: call(served, "GET", f"v1/jobs/{job}")[2]  # noqa: E731
            wait_until(lambda: all(told_of(job)["status"] == "in_progress" for job in jobs), 120)
            studios = [child for child in _children(served) if "Studio" in _title(child)]
            assert len(studios) == 2
            studios[0].kill()
            answers = [future.result() for future in waiting]
        wait_until(
            lambda: all(told_of(job)["status"] in ("succeeded", "failed") for job in jobs),
            600,
            every=0.5,
        )
        ended = [*(told for _, _, told in answers), *map(told_of, jobs)]
        lost = [told for told in ended if told.get("error")]
        assert 0 < len(lost) < 8
        assert {told["error"]["code"] for told in lost} == {"worker_lost"}
        for status, headers, told in answers:
            assert (status, headers["x-should-retry"]) == (
                (503, "true") if told.get("error") else (200, None)
            )
        expected = own(PROMPTS[0], 1, LONG)
        for told in ended:
            if told not in lost:
                assert abs(pixels(told["data"][0]["b64_json"]) - expected).max() <= 1
        # 2. Eight clients ask without a pause while all processes are replaced.
        _draw_through(
            served, own, {"name": "updated", "model": str(model), "folder": str(folder), **SETTINGS}
        )
        # The ledger asks who draws now every few seconds.
        wait_until(
            lambda: call(served, "GET", "v1/models")[2]["data"][0]["id"] == "updated", 60, every=1
        )
        check_pictures(served, own)


def _draw_through(
    served: Served, own: Callable[[str, int, int], np.ndarray], settings: dict[str, Any]
) -> None:
    """At least 500 requests, and as many as there can be until the update has ended: every one is
    drawn, and right.
    """
    expected = [own(PROMPTS[number % 3], number, 2) for number in range(6)]
    ended, numbers = threading.Event(), itertools.count()
    at_once = 8

    def client() -> int:
        answered = 0
        while (number := next(numbers)) < REQUESTS or not ended.is_set():
            which = number % 6
            body = {"prompt": PROMPTS[which % 3], "seed": which, "steps": 2}
            status, _, told = call(served, "POST", "v1/images/generations", body)
            assert status == 200, (number, told)
            assert abs(pixels(told["data"][0]["b64_json"]) - expected[which]).max() <= 1
            answered += 1
        return answered

    before = {child.pid for child in _children(served) if "ServeReplica" in _title(child)}
    with ThreadPoolExecutor(at_once) as clients:
        counts = [clients.submit(client) for _ in range(at_once)]
        try:
            _update(served, settings)
            # Serve tells of an update when the new processes are there; the old ones may still be
            # drawing.
            wait_until(
                lambda: not before & {child.pid for child in _children(served)}, 300, every=0.5
            )
        finally:
            ended.set()
        assert sum(count.result() for count in counts) >= REQUESTS


def _update(served: Served, settings: dict[str, Any]) -> None:
    """What `serve deploy` does, from another process."""
    code = "from ray import serve; from pipelines.serving.application import NAME, build; "
    code += "serve.run(build(json.loads(sys.argv[2])), name=NAME, route_prefix='/')"
    _joined(served, code, json.dumps(settings))


def scraped(served: Served) -> dict[str, float]:
    """What Prometheus reads: our series, each with the value of its one label, over
    all processes.
    """
    code = "import urllib.request as web; node = ray.nodes()[0]; "
    code += 'place = f\'{node["NodeManagerAddress"]}:{node["MetricsExportPort"]}\'; '
    code += "print(web.urlopen(f'http://{place}/metrics').read().decode())"
    found: dict[str, float] = defaultdict(float)
    for line in _joined(served, code).splitlines():
        if not line.startswith("ray_lidit_"):
            continue
        series, _, value = line.rpartition(" ")
        name, _, labels = series.partition("{")
        (label,) = re.findall(rf'\b{METRICS[_declared(name)].tag}="([^"]*)"', labels)
        found[f"{name} {label}"] += float(value)
    return dict(found)


def _declared(series: str) -> str:
    return re.sub("_(bucket|count|sum)$", "", series.partition(" ")[0].removeprefix("ray_"))


def _joined(served: Served, code: str, *words: str) -> str:
    """What Python code prints that is run by a process beside the platform's, on its Ray."""
    (raylet,) = (child for child in _children(served) if child.name() == "raylet")
    (address,) = (
        word.partition("=")[2] for word in raylet.cmdline() if word.startswith("--gcs-address=")
    )
    environment = {
        name: value for name, value in raylet.environ().items() if name.startswith("RAY_")
    }
    command = [sys.executable, "-c", JOINED + code, address, *words]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def _children(served: Served) -> list[psutil.Process]:
    return psutil.Process(served.pid).children(recursive=True)


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:  # it has just ended
        return ""
