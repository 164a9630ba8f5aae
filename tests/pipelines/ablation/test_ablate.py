"""An ablation on real Ray with a tiny real LLM: nested runs, nothing done twice, one page at the
end.
"""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from mlflow import MlflowClient
from mlflow.entities import Run

from benchmarks.gpu import evidence
from lidit.config.shipped import load_ablation
from lidit.errors import InputError
from lidit.store import Corpus
from pipelines.ablation import ablate
from pipelines.ablation.eval_set import EvalSet
from tests.helpers.command import lidit
from tests.helpers.tiny_models import tiny_llm

RESULT = "runs/tiny/arms/{}-seed0/result.json"


@pytest.fixture(scope="module")
def folder(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two arms, one seed, trained by the command."""
    folder = tmp_path_factory.mktemp("ablate")
    llm = str(tiny_llm(folder / "llm", "llama", layers=3, width=32))
    tree = {
        "scenes": {"count": 48, "tags": ["list4"], "styles": ["clauses"]},
        "measures": {"scenes": 8, "points": 2},
        "seeds": [0],
        "arms": {
            "baseline": {"encoders": ["bare"], "model": {"refiner": {"depth": 0}}},
            "refiner": {"encoders": ["bare"]},
        },
        "recipe": {
            "name": "tiny",
            "output": str(folder / "runs"),
            "corpus": str(folder / "corpus"),
            "ingest": {"resolution": 32, "bucket_multiple": 8},
            "encoders": [{"name": "bare", "model": llm, "instruction": "", "layer": 2}],
            "model": {
                "width": 32,
                "depth": 1,
                "heads": 2,
                "patch_size": 8,
                "refiner": {"depth": 1},
            },
            "objective": {"kind": "clean", "timesteps": "uniform"},
            "train": {
                "steps": 4,
                "batch_size": 8,
                "log_every": 1,
                "ema_decay": 0.5,
                "optimizer": {"lr": 1e-2},
            },
            "engine": {"zero_stage": 0},
        },
    }
    (folder / "tiny.yaml").write_text(yaml.safe_dump(tree))
    assert lidit("ablate", folder / "tiny.yaml") == 0
    return folder


def test_every_arm_has_its_result(folder: Path) -> None:
    results = {
        arm: json.loads((folder / RESULT.format(arm)).read_text())
        for arm in ("baseline", "refiner")
    }
    for result in results.values():
        assert [point["step"] for point in result["points"]] == [2, 4]
        assert [step for step, _ in result["losses"]] == [1, 2, 3, 4]
        measured = result["points"][-1]["measures"]["binding, clauses"]
        assert len(measured["by_position"]) == 4
        assert measured["gap"] != 0
    assert results["refiner"]["parameters"] > results["baseline"]["parameters"]
    # the same batches and the same noise; before the first step no arm predicts anything but zero
    assert results["refiner"]["losses"][0] == pytest.approx(results["baseline"]["losses"][0])
    page = (folder / "runs/tiny/report/README.md").read_text()
    assert "refiner > baseline | 54.02 > 38.72" in page


def runs_below_the_ablation(uri: str) -> list[Run]:
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("lidit")
    assert experiment is not None
    (parent,) = client.search_runs([experiment.experiment_id], "tags.`lidit.job` = 'ablate'")
    return client.search_runs(
        [experiment.experiment_id], f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'"
    )


def arms_in(uri: str) -> dict[str, Run]:
    return {
        run.data.tags["lidit.arm"]: run
        for run in runs_below_the_ablation(uri)
        if "lidit.arm" in run.data.tags
    }


def test_arms_are_runs_below_one_run(folder: Path) -> None:
    uri = f"sqlite:///{folder}/runs/mlflow.db"
    client, arms = MlflowClient(uri), arms_in(uri)
    assert set(arms) == {"baseline", "refiner"}
    for run in arms.values():
        assert run.info.status == "FINISHED"
        assert [point.step for point in client.get_metric_history(run.info.run_id, "loss")] == [
            1,
            2,
            3,
            4,
        ]
        assert [point.step for point in client.get_metric_history(run.info.run_id, "accuracy")] == [
            2,
            4,
        ]


def test_only_what_is_missing_is_done_again(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lost = folder / RESULT.format("refiner")
    before = json.loads(lost.read_text())
    kept = (folder / RESULT.format("baseline")).stat().st_mtime_ns
    lost.unlink()
    capsys.readouterr()
    assert lidit("ablate", folder / "tiny.yaml") == 0
    assert "1 arms trained, 1 already there" in capsys.readouterr().out
    assert (folder / RESULT.format("baseline")).stat().st_mtime_ns == kept
    after = json.loads(lost.read_text())
    # the same numbers again
    assert (after["points"], after["losses"]) == (before["points"], before["losses"])


@pytest.mark.slow  # a corpus of its own
def test_arms_that_were_trained_as_stacks_are_finished_arms(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["seeds=[0,1]"]
    assert 0 < evidence.prepare(str(folder / "tiny.yaml"), tmp_path, words) < evidence.MOST_BYTES
    lines = evidence.train(tmp_path, torch.device("cpu"), seconds=600)
    assert [line["trained"] for line in lines] == [2, 2]  # of two shapes, two seeds each
    assert evidence.train(tmp_path, torch.device("cpu"), seconds=600) == []
    capsys.readouterr()
    places = [f"recipe.output={tmp_path}", f"recipe.corpus={tmp_path}/corpus"]
    assert lidit("ablate", folder / "tiny.yaml", *words, *places) == 0
    assert "0 arms trained, 4 already there" in capsys.readouterr().out
    found = json.loads((tmp_path / "tiny/arms/refiner-seed0/result.json").read_text())
    usual = json.loads((folder / RESULT.format("refiner")).read_text())
    assert found["parameters"] == usual["parameters"]
    assert [point["step"] for point in found["points"]] == [2, 4]
    # Other noise, the same weights, samples, captions and noise levels: losses of one size from the
    # first step on.
    assert found["losses"][0][1] == pytest.approx(usual["losses"][0][1], rel=0.1)


def test_a_result_the_tracker_never_saw_is_sent_by_the_next_call(
    folder: Path, tmp_path: Path
) -> None:
    """As after a kill between the two: the arm is finished, its run is not there."""
    marker = (folder / RESULT.format("refiner")).with_name("tracked")
    assert marker.is_file()
    other = f"sqlite:///{tmp_path}/other.db"
    assert lidit("ablate", folder / "tiny.yaml", f"recipe.tracking.uri={other}") == 0
    assert arms_in(other) == {}
    marker.unlink()
    assert lidit("ablate", folder / "tiny.yaml", f"recipe.tracking.uri={other}") == 0
    assert set(arms_in(other)) == {"refiner"}
    assert marker.is_file()


def test_what_this_machine_does_not_have_is_told_first(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        f"recipe.output={tmp_path}",
        f"recipe.corpus={tmp_path}/corpus",
        "recipe.engine.gpus_per_worker=1",
    ]
    assert lidit("ablate", folder / "tiny.yaml", *words) == 2
    assert "engine: 1 workers ask for 1 GPU, this machine offers 0" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_results_of_other_settings_are_refused(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert lidit("ablate", folder / "tiny.yaml", "recipe.train.steps=5") == 2
    assert "other settings or data" in capsys.readouterr().err


def test_arms_beside_a_failing_one_are_finished(folder: Path) -> None:
    ablation = load_ablation(str(folder / "tiny.yaml"))
    home = folder / "runs/tiny"
    corpus = Corpus.open(folder / "corpus")
    jobs = ablate._jobs(
        ablate._absolute(ablation, home), EvalSet.of(ablation, home / "cases"), corpus
    )
    broken = replace(jobs[0], latents="0" * 64)
    found = ablate._results([broken, jobs[1]], ablation, "", "")
    assert next(found)[0].arm == jobs[1].arm
    with pytest.raises(InputError, match="no latents family"):
        next(found)


@pytest.mark.slow
def test_several_workers_go_through_the_ordinary_training(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["recipe.name=wide", "recipe.engine.workers=2", "recipe.train.checkpoint_every=4"]
    words.append(f"recipe.tracking.uri=sqlite:///{folder}/wide.db")
    assert lidit("ablate", folder / "tiny.yaml", *words) == 0
    assert "2 arms trained" in capsys.readouterr().out
    result = json.loads((folder / RESULT.format("refiner").replace("tiny", "wide")).read_text())
    assert [point["step"] for point in result["points"]] == [4]
    assert (folder / "runs/wide/arms/refiner-seed0/model/model_index.json").exists()
    assert result["seconds"] > 1
    below = runs_below_the_ablation(f"sqlite:///{folder}/wide.db")
    # each arm's training, and its result
    assert sorted(run.data.tags["lidit.job"] for run in below) == ["arm", "arm", "train", "train"]
