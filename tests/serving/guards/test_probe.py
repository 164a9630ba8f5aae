"""The probe learns from labelled prompts what an LLM's states tell of them, and says how often it
is right.
"""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from lidit.errors import InputError
from lidit.pipeline.model_encoder import ModelEncoder
from lidit.serving.guards.guard import Guard, SafetyUnavailable
from lidit.serving.guards.probe import Probe, States
from lidit.serving.guards.training import (
    Labelled,
    Rate,
    Trained,
    fit,
    read_labelled,
    separation,
    train_probe,
)
from tests.helpers.tiny_encoders import tiny_encoders

THINGS = ("circle", "square", "triangle", "star", "field", "cube")
COLOURS = ("red", "blue", "green", "yellow", "white")
FORBIDDEN = ("weapon", "bomb")
HARMLESS = ("picture", "drawing")


def prompts() -> list[Labelled]:
    """Prompts that differ in one word by their label, among words that say nothing."""
    made = itertools.product(COLOURS, THINGS, (*FORBIDDEN, *HARMLESS), ("left of", "under"))
    return [
        Labelled(f"a {colour} {thing} {side} a {word}", word in FORBIDDEN)
        for colour, thing, word, side in made
    ]


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ModelEncoder]:
    return tiny_encoders(tmp_path_factory.mktemp("llm"))


@pytest.fixture(scope="module")
def trained(encoders: dict[str, ModelEncoder]) -> Trained:
    return train_probe(prompts(), encoders, most_blocked=0.05)


def states_of(encoders: dict[str, ModelEncoder], prompt: str) -> States:
    return {name: encoder.encode([prompt])[0] for name, encoder in encoders.items()}


def fingerprints(encoders: dict[str, ModelEncoder]) -> dict[str, str]:
    return {name: encoder.fingerprint for name, encoder in encoders.items()}


def test_a_probe_tells_prompts_apart_that_it_has_not_seen(
    trained: Trained, encoders: dict[str, ModelEncoder]
) -> None:
    assert trained.separation > 0.9
    assert trained.refused.hits / trained.refused.of > 0.7
    assert trained.blocked.hits / trained.blocked.of < 0.2
    assert trained.trained_on + trained.refused.of + trained.blocked.of == len(prompts())
    guard = Guard[States]("probe", trained.probe, trained.probe.threshold, 60)
    bad, good = guard.judge(
        [states_of(encoders, f"a red circle under a {word}") for word in ("bomb", "drawing")]
    )
    assert bad.flagged
    assert bad.score > good.score
    assert not good.flagged


def test_labels_without_meaning_are_not_learned(encoders: dict[str, ModelEncoder]) -> None:
    random = np.random.default_rng(0)
    shuffled = [Labelled(one.prompt, bool(random.integers(2))) for one in prompts()]
    found = train_probe(shuffled, encoders)
    assert 0.3 < found.separation < 0.7


def test_a_stricter_threshold_blocks_fewer_and_refuses_fewer(
    trained: Trained, encoders: dict[str, ModelEncoder]
) -> None:
    strict = train_probe(prompts(), encoders, most_blocked=0.001)
    assert strict.probe.threshold > trained.probe.threshold
    assert strict.blocked.hits <= trained.blocked.hits
    with pytest.raises(InputError, match="between 0 and 1"):
        train_probe(prompts(), encoders, most_blocked=1)


def test_a_probe_is_the_same_after_it_was_saved(
    trained: Trained, encoders: dict[str, ModelEncoder], tmp_path: Path
) -> None:
    trained.probe.save(tmp_path / "new" / "probe.safetensors")
    loaded = Probe.load(tmp_path / "new" / "probe.safetensors", fingerprints(encoders))
    states = [states_of(encoders, "a red circle under a bomb")]
    assert loaded.scores(states) == trained.probe.scores(states)
    assert loaded.version == trained.probe.version
    assert loaded.threshold == trained.probe.threshold
    assert loaded.version != Probe(loaded.fingerprints, loaded.weight, loaded.bias + 1, 0.5).version


def damaged(probe: Probe, folder: Path) -> dict[str, Path]:
    """Files that would let everything or nothing pass."""
    files = {
        name: folder / f"{name}.safetensors"
        for name in ("absent", "noise", "nan", "zero", "never", "foreign")
    }
    files["noise"].write_bytes(b"noise")
    for name, changes in (
        ("nan", {"weight": probe.weight * np.nan}),
        ("zero", {"weight": probe.weight * 0}),
        ("never", {"threshold": 1.5}),
    ):
        values = {"weight": probe.weight, "threshold": probe.threshold, **changes}
        Probe(probe.fingerprints, values["weight"], probe.bias, values["threshold"]).save(
            files[name]
        )
    save_file({"weight": probe.weight}, files["foreign"])
    return files


@pytest.mark.parametrize("fault", ["absent", "noise", "nan", "zero", "never", "foreign"])
def test_a_probe_that_cannot_be_right_is_refused(
    fault: str, trained: Trained, encoders: dict[str, ModelEncoder], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="lidit guard train"):
        Probe.load(damaged(trained.probe, tmp_path)[fault], fingerprints(encoders))


def test_a_probe_of_another_model_is_refused(
    trained: Trained, encoders: dict[str, ModelEncoder], tmp_path: Path
) -> None:
    trained.probe.save(tmp_path / "probe.safetensors")
    for other in ({"second": "x", "third": "y"}, {"second": encoders["second"].fingerprint}, {}):
        with pytest.raises(InputError, match="other LLMs"):
            Probe.load(tmp_path / "probe.safetensors", other)


def test_states_that_mean_nothing_close_the_guard(
    trained: Trained, encoders: dict[str, ModelEncoder]
) -> None:
    guard = Guard[States]("probe", trained.probe, trained.probe.threshold, 60)
    good = states_of(encoders, "a red circle")
    for wrong in (
        {},
        {"second": good["second"]},
        {**good, "third": good["third"] * torch.nan},
        {**good, "third": good["third"][:0]},
        {**good, "third": good["third"][:, :5]},
    ):
        with pytest.raises(SafetyUnavailable):
            guard.judge([good, wrong])


def test_the_fit_is_the_optimum() -> None:
    random = np.random.default_rng(1)
    features = random.normal(size=(200, 3)) * (1, 100, 0.01)
    refuse = features @ (1, 0.01, 100) + random.normal(size=200) > 0.5
    weight, bias = fit(features, refuse, strength=1.0)
    scores = features @ weight + bias
    assert separation(scores, refuse) > 0.85
    # Each direction matters about as much, whatever its scale.
    assert np.ptp(np.abs(weight * (1, 100, 0.01))) < 0.5 * np.abs(weight[0])
    assert separation(-scores, refuse) == pytest.approx(1 - separation(scores, refuse))


def write(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_a_labelled_file_is_read_and_its_mistakes_are_named(tmp_path: Path) -> None:
    lines = [json.dumps({"prompt": one.prompt, "refuse": one.refuse}) for one in prompts()]
    assert read_labelled(write(tmp_path / "good.jsonl", *lines, "")) == prompts()
    for wrong in (
        "text",
        "[]",
        '{"prompt": "a"}',
        '{"prompt": 3, "refuse": true}',
        '{"prompt": "a", "refuse": 1}',
    ):
        with pytest.raises(InputError, match="line 3: "):
            read_labelled(write(tmp_path / "bad.jsonl", *lines[:2], wrong))
    with pytest.raises(InputError, match="at least 20 are needed"):
        read_labelled(write(tmp_path / "few.jsonl", *lines[:3]))
    # Spellings of one prompt count once.
    same = [json.dumps({"prompt": "a cat" + "!" * number, "refuse": True}) for number in range(50)]
    with pytest.raises(InputError, match="1 different prompts with refuse true"):
        read_labelled(write(tmp_path / "same.jsonl", *same))
    with pytest.raises(InputError, match="cannot be read"):
        read_labelled(tmp_path / "absent.jsonl")


def test_a_rate_has_its_interval() -> None:
    assert str(Rate(9, 10)) == "9 of 10, 90.0% [59.6%, 98.2%]"
    assert re.fullmatch(r"0 of 500, 0\.0% \[0\.0%, 0\.8%\]", str(Rate(0, 500)))
