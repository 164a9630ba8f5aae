"""The API over HTTP, with a real engine behind it: pictures, errors in one shape, jobs,
cancellation.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from openai import BadRequestError, OpenAI, RateLimitError
from PIL import Image

from lidit.pipeline import LIDiTPipeline
from lidit.serving.keys import KeyStore
from pipelines.serving.api import build_api
from pipelines.serving.finisher import Finisher
from pipelines.serving.flow import Flow
from pipelines.serving.ledger import AUDIT, KEYS
from pipelines.serving.settings import ServeSettings
from pipelines.serving.workers import shown_after
from tests.helpers.one_process import FORBIDDEN, LONG, Answer, Platform, platform, settings_for
from tests.helpers.waiting import wait_until

PROMPT = "a red circle"


def until(condition: Callable[[], bool]) -> None:
    wait_until(condition, 30)


def pixels(text: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB")).astype(int)


def events(answer: Answer) -> list[dict]:
    """The data of server-sent events."""
    blocks = [block for block in answer.body.decode().split("\n\n") if "data: {" in block]
    return [json.loads(block.partition("data: ")[2]) for block in blocks]


@contextmanager
def drawing(served: Platform, **fields: object) -> Iterator[str]:
    """A job that is being drawn and would be for a while."""
    job = served.call("POST", "/v1/jobs", {"prompt": PROMPT, "steps": LONG, **fields}).json["id"]
    before = served.steps
    until(lambda: served.steps > before)
    try:
        yield job
    finally:
        served.call("DELETE", f"/v1/jobs/{job}")


def client(served: Platform) -> OpenAI:
    return OpenAI(base_url=f"{served.url}/v1", api_key=served.key, max_retries=0)


def test_a_picture_is_the_pipelines(served: Platform, model: Path) -> None:
    pipe = LIDiTPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    for size, fields in (
        ((16, 16), {}),
        ((24, 16), {"steps": 3, "guidance_scale": 1.0, "scheduler": "dpm_solver"}),
    ):
        answer = served.draw(PROMPT, n=2, seed=7, size=f"{size[1]}x{size[0]}", **fields)
        assert answer.status == 200
        expected = pipe(
            [PROMPT] * 2,
            seed=[7, 8],
            height=size[0],
            width=size[1],
            num_inference_steps=fields.get("steps"),
            guidance_scale=fields.get("guidance_scale"),
            scheduler=fields.get("scheduler"),
        ).images
        assert [image["seed"] for image in answer.json["data"]] == [7, 8]
        for image, own in zip(answer.json["data"], expected, strict=True):
            assert abs(pixels(image["b64_json"]) - np.asarray(own)).max() <= 1


def test_the_first_seed_is_all_that_draws_pictures_again(served: Platform) -> None:
    drawn = served.draw(PROMPT, n=3).json["data"]
    first = drawn[0]["seed"]
    assert [image["seed"] for image in drawn] == [first, first + 1, first + 2]
    again = served.draw(PROMPT, n=3, seed=first).json["data"]
    for image, same in zip(drawn, again, strict=True):
        assert abs(pixels(image["b64_json"]) - pixels(same["b64_json"])).max() <= 1


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"style": "vivid"}, (400, "unknown_parameter", "style", "false")),
        ({"prompt": None}, (400, "invalid_value", "prompt", "false")),
        ({"prompt": " "}, (400, "invalid_value", "prompt", "false")),
        ({"prompt": "word " * 40}, (400, "invalid_value", "prompt", "false")),
        ({"prompt": "x" * 5000}, (400, "invalid_value", "prompt", "false")),
        ({"prompt": "a\0b"}, (400, "invalid_value", "prompt", "false")),
        ({"n": 0}, (400, "invalid_value", "n", "false")),
        ({"n": "2"}, (400, "invalid_value", "n", "false")),
        ({"n": True}, (400, "invalid_value", "n", "false")),
        ({"size": "17x16"}, (400, "invalid_value", "size", "false")),
        ({"size": "0x16"}, (400, "invalid_value", "size", "false")),
        ({"size": "99999x99999"}, (400, "invalid_value", "size", "false")),
        ({"size": "large"}, (400, "invalid_value", "size", "false")),
        ({"steps": LONG + 1}, (400, "invalid_value", "steps", "false")),
        ({"scheduler": "ddim"}, (400, "invalid_value", "scheduler", "false")),
        ({"guidance_interval": [0.9, 0.1]}, (400, "invalid_value", "guidance_interval", "false")),
        ({"seed": 2**64 - 1, "n": 2}, (400, "invalid_value", "seed", "false")),
        ({"background": "transparent"}, (400, "invalid_value", "background", "false")),
        ({"output_compression": 50}, (400, "invalid_value", "output_compression", "false")),
        ({"partial_images": 1}, (400, "invalid_value", "partial_images", "false")),
        ({"model": "dall-e-3"}, (404, "model_not_found", "model", "false")),
    ],
)
def test_what_cannot_be_drawn_is_named(served: Platform, fields: dict, expected: tuple) -> None:
    before = served.steps
    assert served.draw(**{"prompt": PROMPT, **fields}).error == expected
    assert served.steps == before


def test_every_refusal_has_one_shape(served: Platform) -> None:
    place = "/v1/images/generations"
    moderating = served.new_key(scopes=["moderate"])
    revoked = served.new_key()
    KeyStore(served.folder / KEYS).revoke(revoked.split("_")[1])
    gone = served.new_key(quota=1)
    for answer, expected in (
        (
            served.call("POST", place, {"prompt": "x"}, key=None),
            (401, "missing_api_key", None, "false"),
        ),
        (
            served.call("POST", place, {"prompt": "x"}, key="lidit_guess"),
            (401, "invalid_api_key", None, "false"),
        ),
        (
            served.call("POST", place, {"prompt": "x"}, key=revoked),
            (401, "invalid_api_key", None, "false"),
        ),
        (
            served.call("POST", place, {"prompt": "x"}, key=moderating),
            (403, "insufficient_scope", None, "false"),
        ),
        (
            served.call("POST", place, {"prompt": "x"}, key=gone),
            (429, "insufficient_quota", None, "false"),
        ),
        (served.call("POST", place, b"{"), (400, "invalid_json", None, "false")),
        (served.call("POST", place, b"[]"), (400, "invalid_value", None, "false")),
        (served.call("POST", place, b"{}"), (400, "missing_required_parameter", "prompt", "false")),
        (served.call("POST", place, b"x" * 70_000), (413, "body_too_large", None, "false")),
        (served.call("GET", place), (405, "method_not_allowed", None, "false")),
        (served.call("OPTIONS", place), (405, "method_not_allowed", None, "false")),
        (served.call("GET", "/v1/nothing"), (404, "not_found", None, "false")),
        (served.call("GET", "/nothing"), (404, "not_found", None, "false")),
        (served.call("GET", "/-/routes"), (404, "not_found", None, "false")),
        (served.call("GET", "/v1/models/other"), (404, "model_not_found", "model", "false")),
        (served.call("GET", "/v1/jobs/job_none"), (404, "not_found", None, "false")),
        (served.call("POST", "/v1/verify", b"no picture"), (400, "invalid_image", "body", "false")),
    ):
        assert answer.error == expected
        assert "access-control-allow-origin" not in answer.headers
        assert answer.headers["x-request-id"].startswith("req_")


def test_a_body_is_not_read_for_nobody(served: Platform) -> None:
    """Without a key the answer comes while the body is still on its way."""
    host, port = served.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as line:
        line.sendall(
            b"POST /v1/images/generations HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n\r\n{"
        )
        assert line.recv(100).startswith(b"HTTP/1.1 401")


def test_clients_name_no_requests(served: Platform) -> None:
    named = served.call(
        "GET", "/v1/models", x_request_id="req_" + "0" * 32, x_request_timeout_seconds="0"
    )
    assert named.headers["x-request-id"] != "req_" + "0" * 32


def test_a_refused_prompt_costs_nothing_and_is_written_nowhere(served: Platform) -> None:
    prompt = f"so much {FORBIDDEN} on a unique zeppelin"
    readers = served.flow.stages.readers.values()
    before = served.steps, [reader.cache.misses for reader in readers]
    for fields in ({}, {"stream": True}):
        assert served.draw(prompt, **fields).error == (400, "moderation_blocked", "prompt", "false")
    assert (served.steps, [reader.cache.misses for reader in readers]) == before
    assert '"prompt-refused"' in (served.folder / AUDIT).read_text()
    for file in served.folder.iterdir():
        assert b"zeppelin" not in file.read_bytes(), file


def test_a_negative_prompt_is_checked_and_led_away_from(served: Platform) -> None:
    plain, away = (
        served.draw(PROMPT, seed=3, **fields).json["data"][0]
        for fields in ({}, {"negative_prompt": "a cube"})
    )
    assert plain["b64_json"] != away["b64_json"]
    refused = served.draw(PROMPT, negative_prompt=FORBIDDEN)
    assert refused.error == (400, "moderation_blocked", "prompt", "false")


def test_openais_client_draws_streams_and_is_refused(served: Platform) -> None:
    openai = client(served)
    drawn = openai.images.generate(
        prompt=PROMPT, n=2, size="16x16", extra_body={"seed": 3, "steps": 2}
    )
    assert [pixels(image.b64_json).shape for image in drawn.data] == [(16, 16, 3)] * 2
    assert drawn.usage.input_tokens > 0
    with openai.images.generate(
        prompt=PROMPT,
        stream=True,
        partial_images=2,
        output_format="jpeg",
        extra_body={"seed": 3, "steps": 6},
    ) as stream:
        told = list(stream)
    assert [event.type.rpartition(".")[2] for event in told] == [
        "partial_image",
        "partial_image",
        "completed",
    ]
    assert [event.partial_image_index for event in told[:2]] == [0, 1]
    assert base64.b64decode(told[-1].b64_json).startswith(b"\xff\xd8")
    with pytest.raises(BadRequestError) as refused:
        openai.images.generate(prompt=f"{FORBIDDEN} everywhere")
    assert refused.value.code == "moderation_blocked"
    assert [model.id for model in openai.models.list()] == ["small"]
    judged = openai.moderations.create(input=["a cat", FORBIDDEN.upper()])
    assert [result.flagged for result in judged.results] == [False, True]


def test_openais_client_cancels_by_leaving_its_stream(served: Platform) -> None:
    """After its first preview; most of the steps that were asked for are never taken."""
    before = served.flow.stages.denoiser.engine.counts
    with client(served).images.generate(
        prompt=PROMPT, stream=True, partial_images=3, extra_body={"steps": LONG}
    ) as stream:
        assert next(iter(stream)).type == "image_generation.partial_image"
    until(lambda: served.flow.stages.denoiser.engine.counts.cancelled == before.cancelled + 1)
    ended = served.steps
    assert ended < before.steps + LONG
    until(lambda: served.ledger.admission.units == 0)
    assert served.draw(PROMPT, steps=1).status == 200
    assert served.steps == ended + 1


@pytest.mark.parametrize(
    ("steps", "previews", "expected"),
    [
        (24, 3, [3, 10, 17]),
        (24, 1, [3]),
        (4, 3, [1, 2, 3]),
        (6, 2, [1, 4]),
        (2, 3, [1]),
        (9, 0, []),
    ],
)
def test_the_first_preview_comes_within_a_quarter_of_the_steps(
    steps: int, previews: int, expected: list[int]
) -> None:
    assert list(shown_after(steps, previews)) == expected
    assert list(shown_after(steps, previews).values()) == list(range(len(expected)))


def test_whoever_hangs_up_ends_the_work(served: Platform) -> None:
    """In the middle of a picture, streamed or not, and while it waits."""
    for stream in (False, True):
        body = json.dumps({"prompt": PROMPT, "steps": LONG, "stream": stream}).encode()
        host, port = served.url.removeprefix("http://").split(":")
        before = served.flow.stages.denoiser.engine.counts
        with socket.create_connection((host, int(port)), timeout=20) as line:
            head = (
                "POST /v1/images/generations HTTP/1.1\r\nhost: x\r\nauthorization: Bearer "
                f"{served.key}\r\n"
            )
            line.sendall(
                f"{head}content-type: application/json\r\ncontent-length: "
                f"{len(body)}\r\n\r\n".encode()
                + body
            )
            until(lambda steps=before.steps: served.steps > steps)
        until(
            lambda ended=before.cancelled + 1: (
                served.flow.stages.denoiser.engine.counts.cancelled == ended
            )
        )
        assert served.steps < before.steps + LONG
        until(lambda: served.ledger.admission.units == 0)


def test_a_job_is_followed_cancelled_and_its_keys_alone(served: Platform) -> None:
    with drawing(served, n=2) as job:
        stranger = served.new_key()
        for method in ("GET", "DELETE"):
            assert served.call(method, f"/v1/jobs/{job}", key=stranger).status == 404
        until(lambda: served.call("GET", f"/v1/jobs/{job}").json["status"] == "in_progress")
        ended = served.flow.stages.denoiser.engine.counts.cancelled + 1
        cancelled = served.call("DELETE", f"/v1/jobs/{job}").json
        assert (cancelled["status"], cancelled["data"]) == ("cancelled", None)
        until(lambda: served.flow.stages.denoiser.engine.counts.cancelled == ended)
        steps = served.steps
        assert served.call("DELETE", f"/v1/jobs/{job}").json["status"] == "cancelled"
        told = events(served.call("GET", f"/v1/jobs/{job}/events"))
        # its place may be told more than once
        kinds = list(dict.fromkeys(event["type"] for event in told))
        assert kinds[:3] == ["job.queued", "job.accepted", "job.started"]
        assert told[-1]["type"] == "job.cancelled"
        assert served.steps == steps


def test_events_are_read_on_from_any_of_them(
    served: Platform, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = {"prompt": PROMPT, "steps": 4, "partial_images": 1, "seed": 5}
    job = served.call("POST", "/v1/jobs", body).json["id"]
    every = events(served.call("GET", f"/v1/jobs/{job}/events"))
    assert every[-1]["type"] == "job.succeeded"
    # Told again at another time an event is the same.
    monkeypatch.setattr("pipelines.serving.answers.time", SimpleNamespace(time=lambda: 0.0))
    assert events(served.call("GET", f"/v1/jobs/{job}/events", Last_Event_ID="3")) == every[3:]
    assert events(served.call("GET", f"/v1/jobs/{job}/events?after={len(every)}")) == []
    image = served.call("GET", f"/v1/jobs/{job}").json["data"][0]
    assert image["b64_json"] == served.draw(PROMPT, steps=4, seed=5).json["data"][0]["b64_json"]


def test_the_same_request_under_one_name_is_drawn_once(served: Platform) -> None:
    place = "/v1/images/generations"
    first = served.call("POST", place, {"prompt": PROMPT}, idempotency_key="one")
    steps = served.steps
    again = served.call("POST", place, {"prompt": PROMPT}, idempotency_key="one")
    assert again.json["data"] == first.json["data"]
    assert served.steps == steps
    other = served.call("POST", place, {"prompt": PROMPT, "n": 2}, idempotency_key="one")
    assert other.error == (409, "idempotency_key_reused", None, "false")
    stranger = served.call(
        "POST", place, {"prompt": PROMPT}, served.new_key(), idempotency_key="one"
    )
    assert stranger.json["data"] != first.json["data"]


def test_links_need_no_key_and_end_with_theirs(served: Platform) -> None:
    key = served.new_key()
    url = served.draw(PROMPT, key, response_format="url", output_format="webp").json["data"][0][
        "url"
    ]
    place = url.removeprefix(served.url)
    answer = served.call("GET", place, key=None)
    assert (answer.status, answer.headers["content-type"]) == (200, "image/webp")
    assert Image.open(io.BytesIO(answer.body)).size == (16, 16)
    for other in (
        place[:-1] + ("0" if place[-1] != "0" else "1"),
        place.replace("/0?", "/1?"),
        place.partition("&")[0],
    ):
        assert served.call("GET", other, key=None).error == (404, "not_found", None, "false")
    KeyStore(served.folder / KEYS).revoke(key.split("_")[1])
    assert served.call("GET", place, key=None).status == 404


def test_an_update_is_seen_in_what_is_told_and_what_is_written(
    served: Platform, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A studio that takes the place of another has its own model, under the same ledger."""
    for place in ("ledger", "api"):
        monkeypatch.setattr(f"pipelines.serving.{place}.FACTS_S", 0.0)
    stages = served.flow.stages
    flow = Flow(served.flow.known, stages)
    with platform(settings_for(model, tmp_path), flow) as running:
        assert running.draw(seed=1).json["model"] == "small"
        flow.known = replace(flow.known, name="newer", digest="1" * 64)
        flow.stages = replace(stages, finisher=Finisher("1" * 64))
        until(lambda: running.call("GET", "/v1/models").json["data"][0]["id"] == "newer")
        assert running.draw(seed=1).json["model"] == "newer"
        entries = [
            json.loads(line)["entry"] for line in (tmp_path / AUDIT).read_text().splitlines()
        ]
        assert [e["model"] for e in entries if e["event"] == "issued"] == [
            served.flow.known.digest,
            "1" * 64,
        ]


def test_a_picture_is_known_again(served: Platform) -> None:
    data = base64.b64decode(served.draw(PROMPT).json["data"][0]["b64_json"])
    assert served.call("POST", "/v1/verify", data).json["answer"] == "made_here"
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(
        file, "PNG"
    )
    assert served.call("POST", "/v1/verify", file.getvalue()).json["answer"] == "unknown"


def test_the_document_names_every_address_and_one_shape_of_errors(served: Platform) -> None:
    document = served.call("GET", "/openapi.json", key=None).json
    assert {
        (path, method) for path, operations in document["paths"].items() for method in operations
    } == {
        ("/v1/images/generations", "post"),
        ("/v1/files/{job_id}/{image}", "get"),
        ("/v1/models", "get"),
        ("/v1/models/{name}", "get"),
        ("/v1/jobs", "post"),
        ("/v1/jobs/{job_id}", "get"),
        ("/v1/jobs/{job_id}", "delete"),
        ("/v1/jobs/{job_id}/events", "get"),
        ("/v1/moderations", "post"),
        ("/v1/verify", "post"),
        ("/healthz", "get"),
    }
    for path, operations in document["paths"].items():
        for operation in operations.values():
            assert "422" not in operation["responses"]
            schema = operation["responses"]["default"]["content"]["application/json"]["schema"]
            assert schema == {"$ref": "#/components/schemas/Error"}
            assert ("security" in operation) == (path.startswith("/v1/") and "files" not in path)
    assert "ValidationError" not in json.dumps(document)


def test_a_full_queue_says_when_to_come_again(
    model: Path, tmp_path: Path, served: Platform
) -> None:
    """One key may fill half of the queue, all keys the whole of it."""
    room = 16 * 16 * 2 * LONG  # a guided picture of so many steps
    settings = settings_for(
        model, tmp_path, limits={"steps": LONG, "queue_units": 2 * room, "key_share": 0.5}
    )
    with platform(settings, served.flow) as narrow:
        other = narrow.new_key()
        with drawing(narrow) as first:
            full = narrow.draw(PROMPT)
            assert full.error == (429, "queue_full", None, "true")
            assert 1 <= int(full.headers["retry-after"]) <= 120
            with pytest.raises(RateLimitError):
                client(narrow).images.generate(prompt=PROMPT)
            second = narrow.call("POST", "/v1/jobs", {"prompt": PROMPT, "steps": LONG}, other)
            assert second.status == 202
            assert narrow.draw(PROMPT, narrow.new_key()).error == (429, "queue_full", None, "true")
            narrow.call("DELETE", f"/v1/jobs/{first}")
            narrow.call("DELETE", f"/v1/jobs/{second.json['id']}", key=other)
        assert narrow.draw(PROMPT).status == 200


def test_a_quota_is_charged_by_what_was_drawn(served: Platform) -> None:
    key = served.new_key(quota=16 * 16 * 2 * 10)  # ten guided steps
    assert served.draw(PROMPT, key, steps=6).status == 200
    assert served.draw(f"{FORBIDDEN}", key, steps=4).status == 400  # given back
    spent = served.draw(PROMPT, key, steps=5)
    assert spent.error == (429, "insufficient_quota", None, "false")
    assert int(spent.headers["retry-after"]) > 0
    assert served.draw(PROMPT, key, steps=4).status == 200


def test_a_deadline_ends_the_work(model: Path, tmp_path: Path, served: Platform) -> None:
    settings = settings_for(model, tmp_path, limits={"steps": LONG, "deadline_s": 0.05})
    with platform(settings, served.flow) as hurried:
        cancelled = served.flow.stages.denoiser.engine.counts.cancelled
        assert hurried.draw(PROMPT, steps=LONG, n=4).error == (
            504,
            "deadline_exceeded",
            None,
            "false",
        )
        until(lambda: served.flow.stages.denoiser.engine.counts.cancelled == cancelled + 1)


def test_nothing_is_served_that_cannot_be_written_down(
    model: Path, tmp_path: Path, served: Platform
) -> None:
    with platform(settings_for(model, tmp_path), served.flow) as running:
        assert running.draw(PROMPT).status == 200
        # the log is no longer the one that is continued
        (tmp_path / AUDIT).rename(tmp_path / "moved.jsonl")
        before = running.steps
        for _ in range(2):
            assert running.draw(PROMPT).error == (503, "audit_unavailable", None, "false")
        assert running.steps == before


def test_without_a_door_nothing_is_served(served: Platform) -> None:
    """Serve's proxies would let clients steer them: an application behind such a one refuses."""
    sent: list[dict] = []

    async def ask() -> None:
        app = build_api(served.ledger, ServeSettings(model="nowhere"))
        scope = {
            "type": "http",
            "method": "GET",
            "path": "/v1/models",
            "headers": [(b"x-request-id", b"mine")],
        }

        async def receive() -> dict:
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(message: dict) -> None:
            sent.append(message)

        await app(scope, receive, send)

    asyncio.run(ask())
    assert sent[0]["status"] == 503
