"""Results of suites scored outside, summed up from the command line and tracked beside the model
they are of.
"""

import json
from pathlib import Path

import pytest
from mlflow import MlflowClient
from PIL import Image

from lidit.config import TrackingSettings
from lidit.errors import InputError
from pipelines.evaluation.models import weights_digest
from tests.helpers.command import lidit


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """As much of a model folder as its results need."""
    folder = tmp_path / "run" / "model"
    (folder / "model").mkdir(parents=True)
    (folder / "model_index.json").write_text("{}")
    (folder / "model" / "weights.safetensors").write_bytes(b"weights")
    return folder


def metrics_of(model: Path, suite: str) -> dict[str, float]:
    client = MlflowClient(f"sqlite:///{model.parents[1]}/mlflow.db")
    experiment = client.get_experiment_by_name(TrackingSettings().experiment)
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id], f"tags.`lidit.suite` = '{suite}'")
    return run.data.metrics


def test_official_results_are_summed_up_and_tracked(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = tmp_path / "results.jsonl"
    rows = [
        ("single_object", "a", True),
        ("single_object", "b", True),
        ("colors", "c", True),
        ("colors", "d", False),
    ]
    lines = [
        json.dumps({"tag": tag, "correct": good, "metadata": prompt}) for tag, prompt, good in rows
    ]
    results.write_text("\n".join(lines))
    assert lidit("evaluate", model, "--suite", "geneval", "--parse", results) == 0
    printed = capsys.readouterr().out
    assert "| overall | 0.750 | 0.6 |" in printed
    assert "position, color_attr are missing" in printed
    assert "INCOMPLETE: 4 scored, 2212 in the benchmark" in printed
    metrics = metrics_of(model, "geneval")
    assert metrics["geneval/overall"] == 0.75
    assert metrics["geneval/colors"] == 0.5
    drawn = model.parent / "evaluation" / "geneval"  # where `--prompts` draws
    drawn.mkdir()
    (drawn / "suite.json").write_text('{"images": 4}')
    assert lidit("evaluate", model, "--suite", "geneval", "--parse", results) == 0
    assert "INCOMPLETE" not in capsys.readouterr().out


def test_scores_are_filed_under_the_weights_that_drew_the_images(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def sum_up(results: Path, suite: str = "geneval") -> int:
        return lidit("evaluate", model, "--suite", suite, "--parse", results)

    results = tmp_path / "results.jsonl"
    results.write_text('{"tag": "colors", "correct": true, "metadata": "a"}\n')
    assert sum_up(results) == 0
    assert "NOT CHECKED: no suite.json" in capsys.readouterr().out
    drawn = model.parent / "evaluation" / "geneval"
    drawn.mkdir(parents=True)
    made_with = {
        "suite": "geneval",
        "model": weights_digest(model),
        "sampler": {"steps": 7},
        "images": 1,
    }
    (drawn / "suite.json").write_text(json.dumps(made_with))
    assert sum_up(results) == 0
    assert "NOT CHECKED" not in capsys.readouterr().out
    (drawn / "suite.json").write_text(json.dumps(made_with | {"suite": "dpg-bench"}))
    assert sum_up(results) == 2
    (drawn / "suite.json").write_text(json.dumps(made_with))
    (model / "model" / "weights.safetensors").write_bytes(b"trained on since")
    assert sum_up(results) == 2
    assert "the images were drawn with model" in capsys.readouterr().err
    category = tmp_path / "other" / "t2i-compbench" / "color"  # another run's images, by --parse
    category.mkdir(parents=True)
    (category / "suite.json").write_text(json.dumps(made_with | {"suite": "t2i-compbench"}))
    assert sum_up(category.parent, "t2i-compbench") == 2
    assert f"{category / 'suite.json'}: the images were drawn with model" in capsys.readouterr().err


def test_dpg_categories_come_from_the_graph(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "graph.csv").write_text(
        "item_id,proposition_id,dependency,tuple,question_natural_language\n"
        "first,1,0,entity - whole (sun),Is there a sun?\n"
        "dog1,1,0,entity - whole (dog),Is there a dog?\n"
        'dog1,2,1,"attribute - color (dog, blue)",Is the dog blue?\n'
    )
    (tmp_path / "r.txt").write_text(
        "images/dog1.png, 1.0, 0.5, 0.0, 0.5, 0.5\nModel: images\nDPG-Bench score: 50.0\n"
    )
    answers = [("yes", "yes"), ("yes", "no"), ("no", "yes"), ("yes", "no")]
    corners = ("(0, 0, 32, 32)", "(32, 0, 64, 32)", "(0, 32, 32, 64)", "(32, 32, 64, 64)")
    lines = [
        f"images/dog1.png, {corner}, {question}, {answer}"
        for corner, pair in zip(corners, answers)
        for question, answer in zip(("Is there a dog?", "Is the dog blue?"), pair)
    ]
    (tmp_path / "r_detail.txt").write_text("\n".join(lines) + "\n")
    words = ["--suite", "dpg-bench", "--parse", tmp_path / "r.txt", "--csv", tmp_path / "graph.csv"]
    assert lidit("evaluate", model, *words, "--out", tmp_path / "o") == 0
    printed = capsys.readouterr().out
    assert "| overall | 50.00 | 50.00 | 81.65 |" in printed
    # the last crop only; all crops, zeroed by the parent
    assert "| attribute | 0.00 | 25.00 |" in printed
    assert "1 of the graph's 2 items have no result: first" in printed


def test_segment_scores_give_the_positional_curve(model: Path, tmp_path: Path) -> None:
    scores = tmp_path / "scores.jsonl"
    lines = [
        json.dumps({"prompt": number, "scores": [1, 0.5, 0.5, 0]})
        for number in range(3)
        for _ in range(4)
    ]
    scores.write_text("\n".join(lines) + "\n")
    words = ["--suite", "segments4", "--parse", scores, "--out", tmp_path / "o"]
    assert lidit("evaluate", model, *words) == 0
    assert "| segment 4 | 0.000" in (tmp_path / "o" / "segments4.md").read_text()
    assert Image.open(tmp_path / "o" / "segments4.png").width > 100
    metrics = metrics_of(model, "segments4")
    assert metrics["segments4/drop"] == 1.0


def test_results_of_no_model_are_refused(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = tmp_path / "results.jsonl"
    results.write_text('{"tag": "colors", "correct": true, "metadata": "a"}\n')
    words = ["--suite", "geneval", "--parse", results, "--out", tmp_path / "o"]
    assert lidit("evaluate", tmp_path / "absent", *words) == 2
    assert "absent: no model_index.json, so this is not a model folder" in capsys.readouterr().err
    digest = weights_digest(model)
    (model / "model" / "weights.safetensors").unlink()
    with pytest.raises(InputError, match=r"no weights \(\*\.safetensors\) in the model folder"):
        weights_digest(model)
    assert lidit("evaluate", model, *words) == 2
    assert not (tmp_path / "o").exists()
    (model / "model" / "weights.safetensors").write_bytes(b"others")
    assert weights_digest(model) != digest
