"""Whatever a guard does but answer as agreed, no picture leaves: each broken guard against the
whole application.
"""

from __future__ import annotations

import copy
import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lidit.errors import InputError
from lidit.serving.guards.guard import Guard
from lidit.serving.guards.images import PixelRule
from pipelines.serving.finisher import Finisher
from pipelines.serving.flow import Flow
from pipelines.serving.guarding import PromptGuards
from pipelines.serving.ledger import AUDIT
from pipelines.serving.settings import ServeSettings
from pipelines.serving.studio import check_guards, studio_of
from pipelines.serving.workers import Denoiser
from tests.helpers.one_process import Platform, platform, settings_for

UNAVAILABLE = (503, "safety_unavailable", None, "false")


class Broken:
    """A checker that answers with what a function makes of the number of things to check."""

    version = "broken-1"

    def __init__(self, answer: Callable[[int], Any]) -> None:
        self.answer = answer

    def scores(self, items: Sequence[Any]) -> Any:
        return self.answer(len(items))


def raises(count: int) -> Any:
    raise RuntimeError("no such file: weights.onnx")


def hangs(count: int) -> Any:
    threading.Event().wait(5)
    return [0.0] * count


BROKEN = {
    "raises": raises,
    "hangs": hangs,
    "nothing": lambda count: None,
    "not a number": lambda count: [math.nan] * count,
    "infinite": lambda count: [-math.inf] * count,
    "too few": lambda count: [0.0] * (count - 1),
    "too many": lambda count: [0.0] * (count + 1),
    "words": lambda count: ["safe"] * count,
    "below zero": lambda count: [-1.0] * count,
}


def with_guards(
    served: Platform, words: Guard[str] | None = None, images: Guard[Any] | None = None
) -> Flow:
    """The small platform's flow with other guards."""
    stages, old = served.flow.stages, served.flow.stages.finisher
    assert isinstance(old, Finisher)
    prompts = stages.guards if words is None else PromptGuards([words])
    return Flow(
        served.flow.known,
        replace(stages, guards=prompts, finisher=Finisher(old.digest, images or old.guard)),
    )


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_guard_of_prompts_lets_nothing_be_drawn(
    served: Platform, model: Path, tmp_path: Path, name: str
) -> None:
    guard: Guard[str] = Guard("words", Broken(BROKEN[name]), 0.5, deadline=0.2)
    with platform(settings_for(model, tmp_path), with_guards(served, words=guard)) as running:
        before = running.steps
        for fields in ({}, {"stream": True}):
            assert running.draw(**fields).error == UNAVAILABLE
        assert running.call("POST", "/v1/moderations", {"input": "a cat"}).error == UNAVAILABLE
        assert running.steps == before
        assert '"safety-unavailable"' in (tmp_path / AUDIT).read_text()


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_guard_of_pictures_lets_nothing_out(
    served: Platform, model: Path, tmp_path: Path, name: str
) -> None:
    guard: Guard[Any] = Guard("pictures", Broken(BROKEN[name]), 0.5, deadline=0.2)
    with platform(settings_for(model, tmp_path), with_guards(served, images=guard)) as running:
        assert running.draw().error == UNAVAILABLE
        streamed = running.draw(stream=True, partial_images=3).body.decode()
        assert "safety_unavailable" in streamed
        assert "b64_json" not in streamed  # previews neither
        assert '"issued"' not in (tmp_path / AUDIT).read_text()


def test_a_picture_that_is_refused_is_not_delivered_nor_its_previews(
    served: Platform, model: Path, tmp_path: Path
) -> None:
    """The rule forbids every colour there is."""
    guard: Guard[Any] = Guard("pictures", PixelRule((128, 128, 128), 0.5, 255.0), 0.5)
    with platform(settings_for(model, tmp_path), with_guards(served, images=guard)) as running:
        assert running.draw(n=2).error == (400, "moderation_blocked", "prompt", "false")
        streamed = running.draw(stream=True, partial_images=1).body.decode()
        assert "moderation_blocked" in streamed
        assert "b64_json" not in streamed
        job = running.call("POST", "/v1/jobs", {"prompt": "a cube", "response_format": "url"}).json[
            "id"
        ]
        assert "b64_json" not in running.call("GET", f"/v1/jobs/{job}/events").body.decode()
        assert running.call("GET", f"/v1/jobs/{job}").json["data"] is None
        written = (tmp_path / AUDIT).read_text()
        assert '"image-refused"' in written
        assert '"issued"' not in written


def test_the_guard_of_states_reads_what_the_network_would(
    served: Platform, model: Path, tmp_path: Path
) -> None:
    """It gets every LLM's states, and what it refuses costs no step."""
    seen: list[set[str]] = []

    class Probe:
        version = "probe-1"

        def scores(self, items: Sequence[dict[str, torch.Tensor]]) -> list[float]:
            seen.extend(set(item) for item in items)
            return [1.0 if len(next(iter(item.values()))) > 6 else 0.0 for item in items]

    old = served.flow.stages.denoiser
    assert isinstance(old, Denoiser)
    with_probe = copy.copy(old)  # another one's loop would measure its row caps anew
    with_probe.probe = Guard("probe", Probe(), 0.5)
    flow = Flow(served.flow.known, replace(served.flow.stages, denoiser=with_probe))
    with platform(settings_for(model, tmp_path), flow) as running:
        assert running.draw("a cube").status == 200
        before = running.steps
        longer = "a red cube and a blue cube and one more"
        assert running.draw(longer).error == (400, "moderation_blocked", "prompt", "false")
        assert running.steps == before
    assert seen == [{"llama", "qwen"}] * 2


def test_no_server_starts_without_the_guards_that_it_needs(model: Path, tmp_path: Path) -> None:
    settings = settings_for(model, tmp_path)
    check_guards(settings)
    words = settings.guards.words
    for guards, message in (
        ({}, "no guard of prompts"),
        ({"words": words}, "no guard of pictures"),
    ):
        with pytest.raises(InputError, match=message):
            check_guards(ServeSettings.model_validate({"model": str(model), "guards": guards}))
    Path(str(words)).write_text("# nothing\n")
    with pytest.raises(InputError, match="empty"):
        studio_of(settings)


def test_what_is_not_finite_is_no_picture(served: Platform, model: Path, tmp_path: Path) -> None:
    transformer = served.flow.stages.denoiser.pipeline.model.transformer  # type: ignore[attr-defined]
    hook = transformer.register_forward_hook(lambda module, inputs, output: output * math.nan)
    try:
        assert served.draw().error == (500, "not_finite", None, "false")
    finally:
        hook.remove()
    assert served.draw().status == 200
