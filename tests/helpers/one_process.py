"""The platform in one process: the application as it is, a real engine, a real HTTP
server, no Ray.
"""

from __future__ import annotations

import asyncio
import json
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn

from lidit.serving.keys import KeyStore
from pipelines.serving.api import build_api
from pipelines.serving.door import Door
from pipelines.serving.flow import Flow
from pipelines.serving.ledger import KEYS, Ledger
from pipelines.serving.settings import ServeSettings
from pipelines.serving.studio import register_of
from tests.helpers.servers import free_ports

SCOPES = ("generate", "moderate", "verify")
FORBIDDEN = "gore"
LONG = 400  # steps of a request that is there for a while


@dataclass
class Answer:
    """One HTTP answer."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> tuple[int, str, str | None, str | None]:
        """Status, code, param and x-should-retry."""
        told = self.json["error"]
        assert set(told) == {"message", "type", "param", "code"}
        return self.status, told["code"], told["param"], self.headers.get("x-should-retry")


@dataclass
class Platform:
    """A running platform. key: of a client that may do everything."""

    url: str
    key: str
    folder: Path
    ledger: Ledger
    flow: Flow

    def new_key(self, **facts: Any) -> str:
        text, _ = KeyStore(self.folder / KEYS).add("client", **{"scopes": SCOPES, **facts})
        return text

    def call(
        self, method: str, path: str, body: Any = None, key: str | None = "", **headers: str
    ) -> Answer:
        """One request; `body` as JSON unless it is bytes. key: None sends none."""
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, method=method)
        if data is not None:
            request.add_header("content-type", "application/json")
        if key is not None:
            request.add_header("authorization", f"Bearer {key or self.key}")
        for name, value in headers.items():
            request.add_header(name.replace("_", "-"), value)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return Answer(answer.status, _lower(answer.headers), answer.read())
        except urllib.error.HTTPError as error:
            return Answer(error.code, _lower(error.headers), error.read())

    def draw(self, prompt: str = "a red circle", key: str | None = "", **fields: Any) -> Answer:
        return self.call("POST", "/v1/images/generations", {"prompt": prompt, **fields}, key)

    @property
    def steps(self) -> int:
        """Steps that the network has taken so far."""
        return int(self.flow.stages.denoiser.engine.counts.steps)  # type: ignore[attr-defined]


def settings_for(model: Path, folder: Path, **changes: object) -> ServeSettings:
    """Guarded by a list of one word, and by a rule that no picture breaks."""
    folder.mkdir(parents=True, exist_ok=True)
    words = folder / "words.txt"
    words.write_text(f"{FORBIDDEN}\n")
    tree: dict[str, object] = {
        "model": str(model),
        "folder": str(folder),
        "guards": {
            "words": str(words),
            "pixel_rule": {"colour": [255, 0, 0], "share": 1.0, "distance": 1.0},
        },
        "limits": {"steps": LONG},
        "provenance": {"watermark": True},
    }
    return ServeSettings.model_validate({**tree, **changes})


@contextmanager
def platform(settings: ServeSettings, flow: Flow) -> Iterator[Platform]:
    """Serve a flow on a port of this machine."""
    folder = Path(settings.folder)
    ledger = Ledger(folder, flow, settings.limits, register_of(settings))
    (port,) = free_ports(1)
    config = uvicorn.Config(
        Door(build_api(ledger, settings)), port=port, log_level="error", access_log=False
    )
    server = uvicorn.Server(config)
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=lambda: loop.run_until_complete(server.serve()), daemon=True)
    thread.start()
    text, _ = KeyStore(folder / KEYS).add("tests", SCOPES)
    running = Platform(f"http://127.0.0.1:{port}", text, folder, ledger, flow)
    while not server.started:
        thread.join(0.01)
        assert thread.is_alive()
    try:
        yield running
    finally:
        server.should_exit = True
        thread.join(30)
        loop.run_until_complete(ledger.close())
        loop.close()


def _lower(headers: Any) -> dict[str, str]:
    return {name.lower(): value for name, value in headers.items()}
