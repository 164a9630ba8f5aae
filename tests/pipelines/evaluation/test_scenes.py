"""The scene benchmark of a model folder: drawn in batches into GenEval's layout, resumed, scored,
known again.
"""

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from mlflow import MlflowClient
from mlflow.entities import Run
from PIL import Image
from torch.nn.modules.module import register_module_forward_hook

from lidit.config import EvaluateSettings, SamplerChanges, TrackingSettings
from lidit.datasets.scenes.benchmark import benchmark_prompts
from lidit.errors import InputError
from lidit.evals.scenes.evaluation import evaluate_images
from lidit.models import LIDiT
from lidit.pipeline import LIDiTPipeline, image_bytes
from lidit.store import digest_of
from lidit.store.files.atomic import TEMPORARY_PREFIX
from pipelines.evaluation.scenes import evaluate_scenes
from pipelines.evaluation.scorecard import Scores
from pipelines.tracking import local_store
from tests.helpers.random_model import WEIGHTS, write_model
from tests.helpers.trained import SmallWorld
from tests.helpers.waiting import wait_until

SETTINGS = EvaluateSettings(tags=("colors", "list4"), per_tag=3, images_per_prompt=2, batch_size=5)
IMAGES = 12  # in batches of 5, 5 and 2
STEPS = 3  # of the small world's sampler
FEW = {"tags": ("colors",), "per_tag": 2}  # settings for tests that score often


@pytest.fixture(scope="module")
def model(small_world: SmallWorld, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(small_world, tmp_path_factory.mktemp("scenes") / "run", seed=1)


@pytest.fixture(scope="module")
def tracker(tmp_path_factory: pytest.TempPathFactory) -> TrackingSettings:
    """One store for all tests: making one takes seconds."""
    return TrackingSettings(uri=local_store(tmp_path_factory.mktemp("store")))


@pytest.fixture(scope="module")
def whole(
    model: Path, tracker: TrackingSettings, tmp_path_factory: pytest.TempPathFactory
) -> Scores:
    """An evaluation that nothing interrupted; read its folder, never write to it."""
    return evaluate(model, tracker, tmp_path_factory.mktemp("whole") / "evaluation")


@pytest.fixture
def out(whole: Scores, tmp_path: Path) -> Path:
    """A copy of the whole evaluation, with its times."""
    return shutil.copytree(whole.folder, tmp_path / "out")


def evaluate(model: Path, tracker: TrackingSettings, out: Path, **changes: object) -> Scores:
    return evaluate_scenes(model, SETTINGS.model_copy(update=changes), tracker, out)


@contextmanager
def watched() -> Iterator[list[int]]:
    """The sizes of the batches that networks draw inside, one entry per step."""
    sizes: list[int] = []

    def look(module: object, _: object, output: object) -> None:
        if isinstance(module, LIDiT):
            assert isinstance(output, torch.Tensor)
            sizes.append(len(output) // 2)  # the captions, and the empty caption for guidance

    hook = register_module_forward_hook(look)
    try:
        yield sizes
    finally:
        hook.remove()


def tracked(tracker: TrackingSettings, out: Path) -> Run:
    """The MLflow run of the scores in `out`."""
    client = MlflowClient(tracker.uri)
    experiment = client.get_experiment_by_name(tracker.experiment)
    assert experiment is not None
    identity = json.loads((out / "scores.json").read_text())["identity"]
    (run,) = client.search_runs([experiment.experiment_id], f"tags.`lidit.identity` = '{identity}'")
    return run


def files_of(out: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(out)): path.read_bytes()
        for path in sorted(out.rglob("*"))
        # a plot may differ in its compression; what a killed process was writing stays until the
        # next images
        if path.is_file()
        and path.name != "positions.png"
        and not path.name.startswith(TEMPORARY_PREFIX)
    }


def stamps(out: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in sorted(out.rglob("*")) if path.is_file()}


def images_of(out: Path) -> list[Path]:
    return sorted(out.glob("images/*/*/samples/*.png"))


def test_images_results_and_scores_are_those_of_the_prompts(
    model: Path, tracker: TrackingSettings, whole: Scores
) -> None:
    assert whole.computed
    items = benchmark_prompts(32, "simple", 1, 3, SETTINGS.tags)
    prompts = [item["prompt"] for item in items for _ in range(2)]
    seeds = [1_000_003 + number for number in range(IMAGES)]
    pipe = LIDiTPipeline.from_pretrained(model)
    batches = (slice(start, start + 5) for start in range(0, IMAGES, 5))
    drawn = [
        image_bytes(pipe(prompts[part], seed=seeds[part], output_type="pt").images)
        for part in batches
    ]
    records = [
        json.loads(line) for line in (whole.folder / "results.jsonl").read_text().splitlines()
    ]
    assert [record["prompt"] for record in records] == prompts
    # the paths in the results are real
    shown = [np.asarray(Image.open(whole.folder / record["filename"])) for record in records]
    assert np.array_equal(np.stack(shown), np.concatenate(drawn))
    assert len({image.tobytes() for image in shown}) == IMAGES
    (folder,) = (whole.folder / "images").iterdir()
    assert json.loads((folder / "00002/metadata.jsonl").read_text()) == items[2]
    expected = evaluate_images(items, [shown[i : i + 2] for i in range(0, IMAGES, 2)])
    assert {key: whole.metrics[key] for key in expected.metrics()} == expected.metrics()
    assert (
        "| list4 | **drop**, first quartile less last | 3 | 6 | "
        in (whole.folder / "scores.md").read_text()
    )
    assert {"list4/drop_low", "list4/drop_high"} <= set(whole.metrics)
    run = tracked(tracker, whole.folder)
    assert run.info.status == "FINISHED"
    assert run.data.metrics == {f"scenes/{key}": value for key, value in whole.metrics.items()}
    sent = {artifact.path for artifact in MlflowClient(tracker.uri).list_artifacts(run.info.run_id)}
    assert sent == {"results.jsonl", "scores.md", "grid.png", "positions.png"}
    assert Image.open(whole.folder / "positions.png").width > 100


@pytest.mark.parametrize(
    ("saved", "drawn"),
    # a batch of which any image is missing is drawn whole: in another company an image may differ
    # in its last bits
    [(0, [5, 5, 2]), (3, [5, 5, 2]), (7, [5, 2]), (IMAGES, [])],
)
def test_an_interrupted_evaluation_goes_on_and_ends_the_same(
    model: Path, tracker: TrackingSettings, whole: Scores, out: Path, saved: int, drawn: list[int]
) -> None:
    """As a kill leaves it: the first images are there, in the order of drawing, and nothing after
    them.
    """
    for path in [*images_of(out)[saved:], *(path for path in out.iterdir() if path.is_file())]:
        path.unlink()
    (folder,) = (out / "images").iterdir()
    (folder / f"{TEMPORARY_PREFIX}0").write_bytes(b"\x89PNG")
    kept = stamps(folder)
    with watched() as sizes:
        assert evaluate(model, tracker, out).computed
    assert sizes[::STEPS] == drawn
    assert len(sizes) == STEPS * len(drawn)
    assert [path for path in images_of(out) if path not in kept] == images_of(out)[saved:]
    # written again where there is something to draw
    metadata = set(folder.glob("*/metadata.jsonl"))
    assert all(
        path.stat().st_mtime_ns == stamp for path, stamp in kept.items() if path not in metadata
    )
    assert files_of(out) == files_of(whole.folder)
    done = stamps(out)
    assert not evaluate(model, tracker, out).computed
    assert stamps(out) == done


@pytest.mark.slow
def test_a_killed_evaluation_goes_on_and_ends_the_same(
    model: Path, tracker: TrackingSettings, tmp_path: Path
) -> None:
    words = [
        "tags=[colors,list4]",
        "per_tag=3",
        "images_per_prompt=2",
        "batch_size=5",
        "sampler.steps=300",
    ]
    command = [
        Path(sys.executable).with_name("lidit"),
        "evaluate",
        model,
        *words,
        "--out",
        tmp_path / "out",
    ]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        ended = lambda: None if process.poll() is None else (tmp_path / "log").read_text()  # noqa: E731
        wait_until(lambda: len(images_of(tmp_path / "out")) >= 2, 300, ended)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    kept = {path: path.stat().st_mtime_ns for path in images_of(tmp_path / "out")}
    assert 2 <= len(kept) < IMAGES
    assert not (tmp_path / "out" / "scores.json").exists()
    steps = SamplerChanges(steps=300)
    evaluate(model, tracker, tmp_path / "out", sampler=steps)
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in kept.items())
    evaluate(model, tracker, tmp_path / "whole", sampler=steps)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def test_what_changes_the_images_changes_the_scores(
    model: Path, small_world: SmallWorld, tracker: TrackingSettings, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert evaluate(model, tracker, out, **FEW).computed
    before = stamps(out)
    changed = shutil.copytree(model, tmp_path / "run" / "model")
    # wherever the model is
    assert not evaluate(changed, tracker, out, **FEW, binding_scenes=4, pictures=4).computed
    assert stamps(out) == before

    def sampled_longer() -> None:
        index = json.loads((changed / "model_index.json").read_text())
        index["sampler"]["steps"] += 1
        (changed / "model_index.json").write_text(json.dumps(index))

    def trained_further() -> None:
        shutil.copy(
            write_model(small_world, tmp_path / "other", seed=2) / WEIGHTS, changed / WEIGHTS
        )

    known = {path.read_bytes() for path in images_of(out)}
    for change, seed in ((sampled_longer, 1), (trained_further, 1), (lambda: None, 2)):
        change()
        (earlier,) = (out / "images").iterdir()
        assert evaluate(changed, tracker, out, **FEW, seed=seed).computed, change
        (now,) = (out / "images").iterdir()  # and those of the model as it was are gone
        assert now.name != earlier.name
        images = {path.read_bytes() for path in images_of(out)}
        assert len(images) == 4
        assert not images & known, change
        known |= images
        assert not evaluate(changed, tracker, out, **FEW, seed=seed).computed


def test_scores_that_are_not_whole_or_of_other_rules_are_made_again(
    model: Path, tracker: TrackingSettings, tmp_path: Path
) -> None:
    evaluate(model, tracker, tmp_path, **FEW)
    text, images = (tmp_path / "scores.json").read_text(), stamps(tmp_path / "images")
    earlier = json.loads(text)
    earlier["made_with"]["settings"]["scorer"] -= 1
    earlier["identity"] = digest_of(earlier["made_with"])
    for found in (text[: len(text) // 2], "[]", "{}", '{"identity": 1}', json.dumps(earlier)):
        (tmp_path / "scores.json").write_text(found)
        assert evaluate(model, tracker, tmp_path, **FEW).computed, found
        assert (tmp_path / "scores.json").read_text() == text
    assert stamps(tmp_path / "images") == images


def test_scores_are_written_last(
    model: Path, tracker: TrackingSettings, whole: Scores, out: Path
) -> None:
    (out / "grid.png").unlink()
    (out / "grid.png").mkdir()  # what is written after the results cannot be
    with pytest.raises(IsADirectoryError):
        evaluate(model, tracker, out, **FEW)
    assert (out / "results.jsonl").read_bytes() != (whole.folder / "results.jsonl").read_bytes()
    # else the results of the new settings would count as those of the old
    assert not (out / "scores.json").exists()
    (out / "grid.png").rmdir()
    assert evaluate(model, tracker, out, **FEW).computed
    written = stamps(out)
    assert max(written.values()) == written[out / "scores.json"]
    assert tracked(tracker, out).info.end_time <= written[out / "scores.json"] / 1e6  # milliseconds


def test_a_broken_image_is_named(model: Path, tracker: TrackingSettings, out: Path) -> None:
    (out / "scores.json").unlink()
    path = next(out.rglob("00001/samples/0001.png"))
    content = path.read_bytes()
    # its end is there, so it counts as drawn
    path.write_bytes(content[:40] + bytes(20) + content[60:])
    with pytest.raises(
        InputError,
        match=rf"{path}: not readable as an image .* delete it and run the same command " r"again",
    ):
        evaluate(model, tracker, out)


def test_a_model_folder_without_a_readable_index_is_refused(
    model: Path, tracker: TrackingSettings, tmp_path: Path
) -> None:
    torn = shutil.copytree(model, tmp_path / "model")
    (torn / "model_index.json").write_text('{"sampler": ')
    with pytest.raises(
        InputError, match=r"model_index\.json: cannot be read .* written by lidit " r"train"
    ):
        evaluate(torn, tracker, tmp_path / "out")
    assert not (tmp_path / "out").exists()
