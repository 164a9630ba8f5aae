"""A race of samplers on a model's folder: its files, its budget, and that it is held once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lidit.config import TrackingSettings
from lidit.config.tune import TuneSettings
from lidit.errors import InputError
from pipelines.evaluation.tune import PLOT, SCORES, TABLE, tune_sampler
from pipelines.tracking import local_store
from tests.helpers.random_model import write_model
from tests.helpers.trained import SmallWorld


@pytest.fixture(scope="module")
def model(small_world: SmallWorld, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(small_world, tmp_path_factory.mktemp("tuning") / "run", seed=2)


def test_a_race_is_held_once_and_keeps_to_its_budget(model: Path, tmp_path: Path) -> None:
    settings = TuneSettings(
        steps=(1, 2), schedulers=("euler",), guidance_scales=(1.0, 2.0), guidance_intervals=((0.0,
                                                                                              1.0),
                                                                                              ),
        per_round=1, rounds=3, tags=("colors", "position"), evaluations=40,
    )  # fmt: skip
    tracker = TrackingSettings(uri=local_store(tmp_path / "store"))
    found = tune_sampler(model, settings, tracker, tmp_path / "tuning")
    # Costs 1, 2, 2 and 4 a picture; a round is two prompts; the third would need 54.
    assert found.computed
    assert found.spent <= 40
    record = json.loads((tmp_path / "tuning" / SCORES).read_text())
    assert [c["evaluations"] for c in record["candidates"]] == [1, 2, 2, 4]
    assert max(c["prompts"] for c in record["candidates"]) == 4
    assert (tmp_path / "tuning" / PLOT).stat().st_size > 1000
    assert found.table in (tmp_path / "tuning" / TABLE).read_text()
    again = tune_sampler(model, settings, tracker, tmp_path / "tuning")
    assert not again.computed
    assert (again.sampler, again.table, again.score) == (found.sampler, found.table, found.score)
    with pytest.raises(InputError, match="evaluations: 3 are less than the 18 of one round"):
        tune_sampler(
            model, settings.model_copy(update={"evaluations": 3}), tracker, tmp_path / "tuning"
        )


def test_captions_are_judged_by_the_models_own_losses(model: Path, tmp_path: Path) -> None:
    captions = tmp_path / "captions.txt"
    captions.write_text("a red circle\na blue square\na red circle\n\na green triangle\n")
    settings = TuneSettings(
        steps=(1, 2), schedulers=("euler",), guidance_scales=(1.0,), guidance_intervals=((0.0, 1.0),
                                                                                         ),
        per_round=2, rounds=2, captions=str(captions),
    )  # fmt: skip
    tracker = TrackingSettings(uri=local_store(tmp_path / "store"))
    found = tune_sampler(model, settings, tracker, tmp_path / "tuning")
    record = json.loads((tmp_path / "tuning" / SCORES).read_text())
    assert [c["prompts"] for c in record["candidates"]] == [3, 3]
    assert 0 <= found.score.value <= 1
    captions.write_text("a red circle\n")
    with pytest.raises(InputError, match="1 distinct captions; give a file with two or more"):
        tune_sampler(model, settings, tracker, tmp_path / "tuning")
