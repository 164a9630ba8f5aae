"""`lidit serve` over HTTP against the plain pipeline: what the way to a picture and back adds, and
the first preview.

Part of `python -m benchmarks.serving`. The platform runs as a person starts it, on a Ray of its
own, in processes of their own; one client asks for one picture at a time, in turns with the
pipeline in this process. Its prompt has been read before on both sides, so no LLM is in either
time; decoding and the PNG file are in both. Both sides have the same priority: Ray's processes
step back behind others unless they are told not to.

Other work on the machine stretches these times, and the platform's most, which takes turns of
several processes. So each figure is also given as its tenth percentile, which a busy machine still
reaches in its quiet moments.
"""

from __future__ import annotations

import base64
import io
import json
import os
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from lidit.config import CodecSettings, ObjectiveSettings, SamplerSettings
from lidit.config.shipped import load_recipe
from lidit.models import LIDiT
from lidit.pipeline import LIDiTPipeline, PipelineSettings, save_pipeline
from lidit.pipeline.model_encoder import ModelEncoder
from lidit.text import PromptEncoder, resolve_encoder

PROMPT = "a red circle left of a blue square"
STEPS, LONG = 8, 24
QUEUE = 500_000  # compute units: one request of 245 steps


def demo_folder(folder: Path) -> Path:
    """A model folder of the demo's shape with its two LLMs and random weights."""
    recipe = load_recipe("demo")
    encoders = []
    for settings in recipe.encoders:
        spec = resolve_encoder(settings)
        encoder = PromptEncoder.load(spec)
        fixed = settings.model_copy(update={"dtype": spec.dtype, "storage": spec.storage})
        prefix, empty = encoder.prefix_states()[1], encoder.empty_states()[1]
        mean, deviation = torch.zeros(spec.width), torch.ones(spec.width)
        encoders.append(
            ModelEncoder(fixed, spec.to_dict(), spec.fingerprint, prefix, empty, mean, deviation)
        )
    torch.manual_seed(0)
    model = LIDiT.from_settings(
        recipe.model, {encoder.name: len(encoder.mean) for encoder in encoders}, 3
    ).eval()
    side = recipe.ingest.resolution
    sampler = SamplerSettings(steps=25, guidance_scale=2.0)
    settings = PipelineSettings(
        ObjectiveSettings(kind="clean"), sampler, CodecSettings(), side, side
    )
    save_pipeline(folder / "demo" / "model", model, encoders, settings, {})
    return folder / "demo" / "model"


def measure(model: Path, folder: Path, rounds: int) -> dict[str, Any]:
    """Seconds from the command to the line that says where to go; milliseconds at the median of
    each side and of their difference; the first preview's share of a picture.
    """
    pipeline = LIDiTPipeline.from_pretrained(model)
    pipeline.set_progress_bar_config(disable=True)
    states = pipeline.encode_prompts([PROMPT])
    began = time.perf_counter()
    with _platform(model, folder) as (url, key):
        started = time.perf_counter() - began
        ask = lambda **fields: _ask(url, key, {"prompt": PROMPT, "seed": 1, **fields})  # noqa: E731
        for _ in range(5):
            ask(steps=STEPS)
            _draw(pipeline, states)
        plain, served, shares = [], [], []
        for _ in range(rounds):
            began = time.perf_counter()
            _draw(pipeline, states)
            middle = time.perf_counter()
            ask(steps=STEPS)
            plain.append(1000 * (middle - began))
            served.append(1000 * (time.perf_counter() - middle))
        full = _refusals(url, key, rounds)
        for _ in range(max(rounds // 5, 3)):
            shares.append(_first_preview(url, key))
    return {
        "started_s": round(started, 1),
        "plain_ms": round(statistics.median(plain), 1),
        "served_ms": round(statistics.median(served), 1),
        "overhead_ms": round(statistics.median(served) - statistics.median(plain), 1),
        "queue_full_ms": round(statistics.median(full), 1),
        "first_preview_share": round(statistics.median(shares), 3),
        "of_quiet_moments": {
            "plain_ms": round(_tenth(plain), 1),
            "served_ms": round(_tenth(served), 1),
            "overhead_ms": round(_tenth(served) - _tenth(plain), 1),
            "queue_full_ms": round(_tenth(full), 1),
        },
    }


def _tenth(values: list[float]) -> float:
    return sorted(values)[len(values) // 10]


@contextmanager
def _platform(model: Path, folder: Path) -> Iterator[tuple[str, str]]:
    """The page's address and a key of a running `lidit serve`."""
    command = [
        sys.executable,
        "-m",
        "jobs.serve",
        str(model),
        "--folder",
        str(folder / "kept"),
        "--port",
        "8199",
    ]
    command += ["--set", f"limits.queue_units={QUEUE}", "--set", "limits.steps=1000"]
    process = subprocess.Popen(
        command,
        cwd=Path(__file__).parents[1],
        env=os.environ | {"RAY_worker_niceness": "0"},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    try:
        told: dict[str, str] = {}
        while "try" not in told:
            line = process.stdout.readline()
            if not line:
                raise SystemExit("the platform did not start; what it said stands above")
            name, _, value = line.strip().partition(" ")
            told[name] = value.strip()
        yield told["page"], told["key"]
    finally:
        process.terminate()
        process.wait(300)


def _draw(pipeline: LIDiTPipeline, states: Any) -> bytes:
    """A picture's file, drawn by one call."""
    image = pipeline(states=states, seed=1, num_inference_steps=STEPS).images[0]
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def _refusals(url: str, key: str, count: int) -> list[float]:
    """Milliseconds until a client is told that the queue is full, which one long request is enough
    for.
    """
    job = {"prompt": PROMPT, "steps": QUEUE // (2 * 32 * 32) + 1, "n": 1}
    with urllib.request.urlopen(_request(url, key, job, "v1/jobs"), timeout=600) as answer:
        place = json.load(answer)["id"]
    taken = []
    for _ in range(count):
        began = time.perf_counter()
        try:
            _ask(url, key, {"prompt": PROMPT, "steps": STEPS})
        except urllib.error.HTTPError as error:
            if error.code != 429:
                raise
            taken.append(1000 * (time.perf_counter() - began))
        else:  # the long one has ended
            break
    cancel = urllib.request.Request(
        f"{url}v1/jobs/{place}", method="DELETE", headers={"authorization": f"Bearer {key}"}
    )
    urllib.request.urlopen(cancel, timeout=600).close()
    return taken or [float("nan")]


def _request(
    url: str, key: str, body: dict[str, Any], place: str = "v1/images/generations"
) -> urllib.request.Request:
    headers = {"authorization": f"Bearer {key}", "content-type": "application/json"}
    return urllib.request.Request(f"{url}{place}", json.dumps(body).encode(), headers)


def _ask(url: str, key: str, body: dict[str, Any]) -> bytes:
    with urllib.request.urlopen(_request(url, key, body), timeout=600) as answer:
        return base64.b64decode(json.load(answer)["data"][0]["b64_json"])


def _first_preview(url: str, key: str) -> float:
    """Seconds to the first of three previews over seconds to the picture."""
    body = {"prompt": PROMPT, "steps": LONG, "stream": True, "partial_images": 3}
    began, first = time.perf_counter(), None
    with urllib.request.urlopen(_request(url, key, body), timeout=600) as answer:
        for line in answer:
            if first is None and b"partial_image" in line:
                first = time.perf_counter() - began
            if b"image_generation.completed" in line:
                assert first is not None
                return first / (time.perf_counter() - began)
    raise SystemExit("a stream ended without a picture")
