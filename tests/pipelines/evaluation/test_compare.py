"""What the comparison page says of scores: whose they are, which can be compared, and what is wrong
with a file.
"""

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from lidit.config import EvaluateSettings, TrackingSettings
from lidit.errors import InputError
from pipelines.evaluation.binding import evaluate_binding
from pipelines.evaluation.compare import compare_runs
from pipelines.evaluation.models import model_identity
from pipelines.evaluation.scenes import evaluate_scenes
from pipelines.tracking import local_store
from tests.helpers.random_model import WEIGHTS, write_model
from tests.helpers.trained import SmallWorld

SETTINGS = EvaluateSettings(tags=("colors",), per_tag=1, binding_scenes=2)
SCORES, BINDING = "scores.json", "binding.json"


@dataclass(frozen=True)
class Evaluated:
    """Two models of one shape, and what `lidit evaluate` wrote of the first: file ->
    its content.
    """

    models: dict[str, Path]
    records: dict[str, dict[str, Any]]

    def write_run(
        self, folder: Path, lax: float, binding: float | None = None, **settings: object
    ) -> Path:
        """A run with the model of the folder's name, a or b, and scores of these values; `settings`
        of the first.
        """
        shutil.copytree(self.models[folder.name], folder / "model")
        self.write_scores(folder, SCORES, lax, **settings)
        if binding is not None:
            self.write_scores(folder, BINDING, binding)
        return folder

    def write_scores(self, folder: Path, file: str, value: float, **settings: object) -> None:
        """The real record with the one score, as of the model that is in the folder now."""
        made_with = self.records[file]["made_with"]
        now = model_identity(folder / "model")
        made_with = {
            "model": {key: now[key] for key in made_with["model"]},
            "settings": made_with["settings"] | settings,
        }
        name = "overall/lax" if file == SCORES else "binding_position_bare/accuracy"
        metrics = {name: value, f"{name}_low": value - 0.1, f"{name}_high": value + 0.1}
        (folder / "evaluation").mkdir(exist_ok=True)
        record = self.records[file] | {"made_with": made_with, "metrics": metrics}
        (folder / "evaluation" / file).write_text(json.dumps(record))


@pytest.fixture(scope="module")
def evaluated(small_world: SmallWorld, tmp_path_factory: pytest.TempPathFactory) -> Evaluated:
    folder = tmp_path_factory.mktemp("compared")
    models = {name: write_model(small_world, folder / name, seed) for seed, name in enumerate("ab")}
    tracker = TrackingSettings(uri=local_store(folder))
    for evaluate in (evaluate_scenes, evaluate_binding):
        evaluate(models["a"], SETTINGS, tracker, folder / "evaluation")
    records = {
        file: json.loads((folder / "evaluation" / file).read_text()) for file in (SCORES, BINDING)
    }
    return Evaluated(models, records)


def page(*runs: Path) -> str:
    return compare_runs(runs, ["a red circle"], (0,), runs[0].parent / "page.html").read_text()


def best(text: str) -> list[str]:
    return re.findall(r'class="number best">([^<]+) \[', text)


def change_index(run: Path, **changes: Any) -> None:
    index = json.loads((run / "model/model_index.json").read_text())
    index["sampler"] |= changes.pop("sampler", {})
    (run / "model/model_index.json").write_text(json.dumps(index | changes))


def test_runs_evaluated_alike_are_compared(evaluated: Evaluated, tmp_path: Path) -> None:
    runs = (
        evaluated.write_run(tmp_path / "a", 0.25, 0.9),
        evaluated.write_run(tmp_path / "b", 0.75, 0.6, batch_size=8),
    )
    text = page(*runs)
    assert best(text) == ["0.750", "0.900"]
    assert "cannot be compared" not in text
    assert "left out" not in text


@pytest.mark.parametrize("other", [{"per_tag": 2}, {"layout": "free"}, {"images_per_prompt": 4}])
def test_runs_evaluated_otherwise_have_no_best(
    evaluated: Evaluated, tmp_path: Path, other: dict[str, Any]
) -> None:
    text = page(
        evaluated.write_run(tmp_path / "a", 0.25, 0.9),
        evaluated.write_run(tmp_path / "b", 0.75, 0.6, **other),
    )
    assert best(text) == ["0.900"]  # binding was measured alike
    assert "<td>overall/lax *</td>" in text
    assert "these numbers cannot be compared" in text
    ((key, value),) = other.items()
    assert f"{key}={value}" in text  # what differs is among the settings
    assert '<tr class="differs"><td>evaluation/scores.json' in text


def test_another_image_size_is_another_benchmark(evaluated: Evaluated, tmp_path: Path) -> None:
    runs = evaluated.write_run(tmp_path / "a", 0.25), evaluated.write_run(tmp_path / "b", 0.75)
    change_index(runs[1], height=64, width=64)
    evaluated.write_scores(runs[1], SCORES, 0.75)
    text = page(*runs)
    assert "0.750" in text
    assert best(text) == []


def test_scores_of_the_model_as_it_was_are_left_out(evaluated: Evaluated, tmp_path: Path) -> None:
    runs = (
        evaluated.write_run(tmp_path / "a", 0.25, 0.9),
        evaluated.write_run(tmp_path / "b", 0.75, 0.6),
    )
    # as if it was trained further
    shutil.copy(evaluated.models["a"] / WEIGHTS, runs[1] / "model" / WEIGHTS)
    text = page(*runs)
    assert best(text) == []
    assert "0.750" not in text
    assert "0.600" not in text
    assert "0.250" in text
    for command in ("model</p>", "model --binding</p>"):
        assert f"(other weights); run lidit evaluate {runs[1]}/{command}" in text
    assert "b: evaluation/scores.json is left out" in text


def test_another_guidance_makes_other_pictures_and_the_same_losses(
    evaluated: Evaluated, tmp_path: Path
) -> None:
    runs = (
        evaluated.write_run(tmp_path / "a", 0.25, 0.9),
        evaluated.write_run(tmp_path / "b", 0.75, 0.6),
    )
    change_index(runs[1], sampler={"guidance_scale": 5.0})
    text = page(*runs)
    assert "(other sampler); run" in text
    assert "0.750" not in text
    assert best(text) == ["0.900"]


def test_scores_that_do_not_say_of_what_they_are_are_left_out(
    evaluated: Evaluated, tmp_path: Path
) -> None:
    runs = evaluated.write_run(tmp_path / "a", 0.25), evaluated.write_run(tmp_path / "b", 0.75)
    for folder in runs:
        path = folder / "evaluation" / SCORES
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
    evaluated: Evaluated, tmp_path: Path, content: str
) -> None:
    runs = evaluated.write_run(tmp_path / "a", 0.25), evaluated.write_run(tmp_path / "b", 0.75)
    # loading this model would be refused in other words
    (runs[0] / "model/model/config.json").unlink()
    path = runs[1] / "evaluation" / SCORES
    path.write_text(content)
    with pytest.raises(
        InputError, match=rf"{path}: not readable as scores .* delete it and run lidit evaluate"
    ) as caught:
        page(*runs)
    assert "\n" not in str(caught.value)
    path.unlink()
    with pytest.raises(InputError, match=r"config\.json: cannot be read"):
        page(*runs)
