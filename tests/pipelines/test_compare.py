"""What the comparison page says of scores: whose they are, which can be compared, and what is wrong with a file."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from lidit.errors import InputError
from pipelines import compare
from pipelines.evaluate import model_identity

SETTINGS = {"per_tag": 24, "images_per_prompt": 1, "layout": "simple", "tags": [], "seed": 1, "batch_size": 64}


def write_run(folder: Path, lax: float, binding: float | None = None, **settings: object) -> Path:
    model = folder / "model"
    model.mkdir(parents=True)
    index = {"sampler": {"guidance_scale": 3.0}, "height": 32, "width": 32}
    (model / "model_index.json").write_text(json.dumps(index))
    (model / "weights.safetensors").write_bytes(folder.name.encode())
    identity = model_identity(model)
    write_scores(folder, "scores.json", {"model": identity, "settings": SETTINGS | settings}, lax)
    if binding is not None:
        del identity["sampler"]
        write_scores(folder, "binding.json", {"model": identity, "settings": {"binding_scenes": 8}}, binding)
    return folder


def write_scores(folder: Path, file: str, made_with: object, value: float) -> None:
    (folder / "evaluation").mkdir(exist_ok=True)
    record = {"identity": "x", "made_with": made_with, "metrics": {"overall/lax": value}, "table": ""}
    (folder / "evaluation" / file).write_text(json.dumps(record))


@pytest.fixture(autouse=True)
def painter(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Stands for every model; counts how many were loaded."""
    loaded = SimpleNamespace(count=0)

    def load(_: Path) -> object:
        loaded.count += 1
        return lambda prompts, **_: np.zeros((len(prompts), 32, 32, 3), np.uint8)

    monkeypatch.setattr(compare, "load_pipeline", load)
    return loaded


def page(*runs: Path) -> str:
    return compare.compare_runs(runs, ["a red circle"], (0,), runs[0].parent / "page.html").read_text()


def best(text: str) -> list[str]:
    return re.findall(r'class="number best">([^<]+)<', text)


def test_runs_evaluated_alike_are_compared(tmp_path: Path) -> None:
    text = page(write_run(tmp_path / "a", 0.25, 0.9), write_run(tmp_path / "b", 0.75, 0.6, batch_size=8))
    assert best(text) == ["0.750", "0.900"]
    assert "cannot be compared" not in text
    assert "left out" not in text


@pytest.mark.parametrize("other", [{"per_tag": 2}, {"layout": "free"}, {"images_per_prompt": 4}])
def test_runs_evaluated_otherwise_have_no_best(tmp_path: Path, other: dict) -> None:
    text = page(write_run(tmp_path / "a", 0.25, 0.9), write_run(tmp_path / "b", 0.75, 0.6, **other))
    assert best(text) == ["0.900"]  # binding was measured alike
    assert "<td>overall/lax *</td>" in text
    assert "these numbers cannot be compared" in text
    ((key, value),) = other.items()
    assert f"{key}={value}" in text  # what differs is among the settings
    assert '<tr class="differs"><td>evaluation/scores.json' in text


def test_another_image_size_is_another_benchmark(tmp_path: Path) -> None:
    runs = write_run(tmp_path / "a", 0.25), write_run(tmp_path / "b", 0.75)
    index = {"sampler": {"guidance_scale": 3.0}, "height": 64, "width": 64}
    (runs[1] / "model/model_index.json").write_text(json.dumps(index))
    write_scores(runs[1], "scores.json", {"model": model_identity(runs[1] / "model"), "settings": SETTINGS}, 0.75)
    assert best(page(*runs)) == []


def test_scores_of_the_model_as_it_was_are_left_out(tmp_path: Path) -> None:
    runs = write_run(tmp_path / "a", 0.25, 0.9), write_run(tmp_path / "b", 0.75, 0.6)
    (runs[1] / "model/weights.safetensors").write_bytes(b"trained further")
    text = page(*runs)
    assert best(text) == []
    assert "0.750" not in text
    assert "0.600" not in text
    assert "0.250" in text
    for command in ("model</p>", "model --binding</p>"):
        assert f"(other weights); run lidit evaluate {runs[1]}/{command}" in text
    assert "b: evaluation/scores.json is left out" in text


def test_another_guidance_makes_other_pictures_and_the_same_losses(tmp_path: Path) -> None:
    runs = write_run(tmp_path / "a", 0.25, 0.9), write_run(tmp_path / "b", 0.75, 0.6)
    index = {"sampler": {"guidance_scale": 5.0}, "height": 32, "width": 32}
    (runs[1] / "model/model_index.json").write_text(json.dumps(index))
    text = page(*runs)
    assert "(other sampler); run" in text
    assert "0.750" not in text
    assert best(text) == ["0.900"]


def test_scores_that_do_not_say_of_what_they_are_are_left_out(tmp_path: Path) -> None:
    runs = write_run(tmp_path / "a", 0.25), write_run(tmp_path / "b", 0.75)
    for folder in runs:
        path = folder / "evaluation/scores.json"
        record = json.loads(path.read_text())
        del record["made_with"]
        path.write_text(json.dumps(record))
    text = page(*runs)
    assert text.count("is left out") == 2
    assert "overall/lax" not in text


@pytest.mark.parametrize(
    "content",
    [
        '{"metrics": {"a"',
        "[]",
        '{"metrics": {"a": "b"}}',
        '{"metrics": {}, "made_with": 3}',
        '{"metrics": {}, "made_with": {"model": {}}}',
        "\x00",
    ],
)
def test_a_torn_file_is_one_clear_message_before_anything_is_drawn(
    tmp_path: Path, painter: SimpleNamespace, content: str
) -> None:
    runs = write_run(tmp_path / "a", 0.25), write_run(tmp_path / "b", 0.75)
    path = runs[1] / "evaluation/scores.json"
    path.write_text(content)
    with pytest.raises(
        InputError, match=rf"{path}: not readable as scores .* delete it and run lidit evaluate"
    ) as caught:
        page(*runs)
    assert "\n" not in str(caught.value)
    assert painter.count == 0
