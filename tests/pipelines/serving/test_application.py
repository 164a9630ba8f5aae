"""The whole application on a real Ray: gateway, ledger and studios, or every stage apart. Killed, updated, right."""

from __future__ import annotations

import base64
import io
import json
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from openai import OpenAI
from PIL import Image

from lidit.pipeline import LIDiTPipeline
from tests.helpers.servers import free_ports
from tests.helpers.waiting import wait_until

ROOT = Path(__file__).parents[3]
PROMPTS = ("a red cube", "a circle", "a green square left of the red circle")


@dataclass(frozen=True)
class Served:
    """A running `lidit serve`: the page's address, the first key, the process."""

    url: str
    key: str
    pid: int


@contextmanager
def serving(model: Path, folder: Path, *words: str) -> Iterator[Served]:
    """`lidit serve` as a person starts it."""
    (port,) = free_ports(1)
    command = [sys.executable, "-m", "jobs.serve", str(model), "--port", str(port), "--folder", str(folder), *words]
    with (folder.parent / "serve.log").open("w") as errors:
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=errors, text=True)
        try:
            told = _told(process, folder.parent / "serve.log")
            yield Served(told["page"], told["key"], process.pid)
        finally:
            process.terminate()
            assert process.wait(120) == 0, (folder.parent / "serve.log").read_text()[-3000:]


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

    def drawn(prompt: str, seed: int, steps: int) -> np.ndarray:
        return np.asarray(pipe([prompt], seed=seed, num_inference_steps=steps).images[0]).astype(int)

    return drawn


def pixels(text: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB")).astype(int)


def check_pictures(served: Served, own: Callable[[str, int, int], np.ndarray]) -> None:
    """Eight clients at once, each with its own words, seed and steps, get the pipeline's pictures."""
    client = OpenAI(base_url=f"{served.url}v1", api_key=served.key, max_retries=0)

    def draw(number: int) -> None:
        prompt, steps = PROMPTS[number % 3], 2 + number % 4
        answer = client.images.generate(prompt=prompt, extra_body={"seed": number, "steps": steps})
        assert answer.data is not None
        assert abs(pixels(str(answer.data[0].b64_json)) - own(prompt, number, steps)).max() <= 1

    with ThreadPoolExecutor(8) as clients:
        list(clients.map(draw, range(16)))


def call(served: Served, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any, Any]:
    request = urllib.request.Request(served.url + path, json.dumps(body).encode() if body else None, method=method)
    fields = {"authorization": f"Bearer {served.key}", "content-type": "application/json", **headers}
    for name, value in fields.items():
        request.add_header(name.replace("_", "-"), value)
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return answer.status, answer.headers, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, error.headers, json.loads(error.read())


@pytest.mark.slow
@pytest.mark.parametrize("together", ["true", "false"])
def test_a_model_is_served_on_a_ray_of_its_own(model: Path, tmp_path: Path, together: str) -> None:
    folder = tmp_path / "kept"
    with serving(model, folder, "--set", f"together={together}", "--set", "limits.steps=1000") as served:
        check_pictures(served, reference(model))
        # Clients do not steer Serve: neither by headers nor at its own addresses.
        status, headers, _ = call(served, "GET", "v1/models", x_request_id="mine", x_request_timeout_seconds="0.0001")
        assert status == 200
        assert headers.get_all("x-request-id")[0].startswith("req_")
        assert len(headers.get_all("x-request-id")) == 1
        assert call(served, "GET", "-/routes")[0] == 404
        assert call(served, "GET", "v1/nothing")[2]["error"]["code"] == "not_found"
        # A job ends where it is cancelled.
        _, _, job = call(served, "POST", "v1/jobs", {"prompt": PROMPTS[0], "steps": 1000})
        begun = lambda: call(served, "GET", f"v1/jobs/{job['id']}")[2]["status"] == "in_progress"  # noqa: E731
        wait_until(begun, 60)
        assert call(served, "DELETE", f"v1/jobs/{job['id']}")[2]["status"] == "cancelled"
        status, _, drawn = call(served, "POST", "v1/images/generations", {"prompt": PROMPTS[1]})
        assert status == 200, drawn
    assert '"stopped"' in (folder / "audit.jsonl").read_text()


@pytest.mark.slow
def test_a_killed_studio_fails_its_own_requests_alone_and_comes_back(model: Path, tmp_path: Path) -> None:
    """Of two: whoever was drawn by it is told to try again, the other's pictures are right, and so are later ones."""
    folder, own = tmp_path / "kept", reference(model)
    with serving(model, folder, "--set", "studio.replicas=2", "--set", "limits.steps=1000") as served:
        body = {"prompt": PROMPTS[0], "steps": 1000, "seed": 1}
        with ThreadPoolExecutor(8) as clients:
            waiting = [clients.submit(call, served, "POST", "v1/images/generations", body) for _ in range(8)]
            jobs = lambda: (folder / "audit.jsonl").read_text().count('"accepted"')  # noqa: E731
            wait_until(lambda: jobs() == 8, 60)
            studios = [
                child for child in psutil.Process(served.pid).children(recursive=True) if "Studio" in _title(child)
            ]
            assert len(studios) == 2
            studios[0].kill()
            answers = [future.result() for future in waiting]
        lost = [answer for answer in answers if answer[0] != 200]
        assert 0 < len(lost) < 8
        for status, headers, told in lost:
            assert (status, told["error"]["code"], headers["x-should-retry"]) == (503, "worker_lost", "true")
        for _, _, told in (answer for answer in answers if answer[0] == 200):
            assert abs(pixels(told["data"][0]["b64_json"]) - own(PROMPTS[0], 1, 1000)).max() <= 1
        check_pictures(served, own)


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:  # it has just ended
        return ""
