"""What is found out about a model is tracked where its run is."""

import json
from pathlib import Path

from lidit.config import Recipe, TrackingSettings
from pipelines.evaluation.models import tracking_of


def test_the_tracking_of_a_model_is_its_runs(tmp_path: Path) -> None:
    recipe = Recipe.model_validate(
        {"name": "r", "corpus": "c", "encoders": [{"name": "a", "model": "x"}]}
        | {"tracking": {"uri": "https://mlflow.example", "experiment": "mine"}}
    )
    run = tmp_path / "r"
    (run / "model").mkdir(parents=True)
    assert tracking_of(run / "model") == TrackingSettings()
    (run / "recipe.json").write_text(recipe.model_dump_json())
    assert tracking_of(run / "model") == recipe.tracking
    more = {**json.loads(recipe.model_dump_json()), "distill": {"kind": "guidance"}}
    (run / "recipe.json").write_text(json.dumps(more))  # of a training with another loss
    assert tracking_of(run / "model") == recipe.tracking
    (run / "recipe.json").write_text("[1]")
    assert tracking_of(run / "model") == TrackingSettings()
