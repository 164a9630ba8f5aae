"""The scene benchmark of a model folder: drawn in batches into GenEval's layout, resumed, scored, known again."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from lidit.config import EvaluateSettings, TrackingSettings
from lidit.errors import InputError
from lidit.evals.evaluate import evaluate_images
from lidit.evals.scenes import benchmark_prompts
from pipelines import evaluate, tracking
from pipelines.evaluate import evaluate_scenes

SETTINGS = EvaluateSettings(tags=("colors", "list4"), per_tag=3, images_per_prompt=2, batch_size=5)


class Painter:
    """Draws noise that depends on the prompt, the seed and, in one pixel, on the whole batch; dies when told to."""

    config = SimpleNamespace(height=32)

    def __init__(self, lives: int = 1000) -> None:
        self.lives, self.drawn = lives, []

    def __call__(self, prompts: Sequence[str], *, seed: Sequence[int], output_type: str) -> NDArray[np.uint8]:
        assert output_type == "np"
        if not self.lives:
            raise KeyboardInterrupt
        self.lives -= 1
        images = []
        for one in zip(prompts, seed, strict=True):
            self.drawn.append(one)
            images.append(self.image(*one))
            images[-1][0, 0] = hashlib.sha256(f"{prompts}{seed}".encode()).digest()[0]
        return np.stack(images)

    @staticmethod
    def image(prompt: str, seed: int) -> NDArray[np.uint8]:
        rng = np.random.default_rng([seed, *prompt.encode()])
        return rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)


def write_model(folder: Path, guidance: float = 3.0, weights: bytes = b"weights") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    index = {"sampler": {"steps": 3, "guidance_scale": guidance}, "height": 32, "width": 32}
    (folder / "model_index.json").write_text(json.dumps(index))
    (folder / "weights.safetensors").write_bytes(weights)
    return folder


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "run/model")


class Tracker:
    """Takes the place of MLflow, which costs seconds a test."""

    logged: dict[str, float] = {}
    files: list[str] = []

    def metrics(self, values: dict[str, float], step: int) -> None:
        Tracker.logged = values

    def artifact(self, path: Path) -> None:
        assert path.is_file()
        Tracker.files.append(path.name)


@contextmanager
def tracked_run(*_: object) -> Iterator[Tracker]:
    Tracker.files.clear()
    yield Tracker()


def run(model: Path, painter: Painter, out: Path, settings: EvaluateSettings = SETTINGS) -> evaluate.SceneScores:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "load_pipeline", lambda _: painter)
        patch.setattr(tracking, "tracked_run", tracked_run)
        return evaluate_scenes(model, settings, TrackingSettings(), out)


def files_of(out: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(out)): path.read_bytes()
        for path in sorted(out.rglob("*"))
        if path.is_file() and path.name != "positions.png"  # a plot may differ in its compression
    }


def test_images_results_and_scores_are_those_of_the_prompts(model: Path, tmp_path: Path) -> None:
    painter, out = Painter(), tmp_path / "out"
    scores = run(model, painter, out)
    assert scores.computed
    items = benchmark_prompts(32, "simple", 1, 3, SETTINGS.tags)
    wanted = [(item["prompt"], 1_000_003 + 2 * n + i) for n, item in enumerate(items) for i in range(2)]
    assert painter.drawn == wanted
    records = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert len(records) == 12
    shown = []
    for record, one in zip(records, wanted):
        shown.append(np.asarray(Image.open(out / record["filename"])))  # the paths in the results are real
        assert (shown[-1][1:] == Painter.image(*one)[1:]).all()
    (folder,) = (out / "images").iterdir()
    assert json.loads((folder / "00002/metadata.jsonl").read_text()) == items[2]
    expected = evaluate_images(items, [shown[i : i + 2] for i in range(0, 12, 2)])
    assert {key: scores.metrics[key] for key in expected.metrics()} == expected.metrics()
    assert "| list4 | **drop**, first quartile less last | 3 | 6 | " in (out / "scores.md").read_text()
    assert {"list4/drop_low", "list4/drop_high"} <= set(scores.metrics)
    assert Tracker.logged == {f"scenes/{key}": value for key, value in scores.metrics.items()}
    assert Tracker.files == ["results.jsonl", "scores.md", "grid.png", "positions.png"]
    assert Image.open(out / "positions.png").width > 100


@pytest.mark.parametrize("batches", [0, 1, 2])
def test_an_interrupted_drawing_goes_on_and_ends_the_same(model: Path, tmp_path: Path, batches: int) -> None:
    whole = tmp_path / "whole"
    run(model, Painter(), whole)
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        run(model, Painter(lives=batches), out)
    kept = {path: path.stat().st_mtime_ns for path in out.rglob("*.png")}
    assert len(kept) == 5 * batches
    if kept:  # killed while it saved a batch: the batch is drawn in the same company again
        lost = sorted(kept)[2]
        del kept[lost]
        lost.unlink()
    second = Painter()
    run(model, second, out)
    assert len(second.drawn) == 12 - 5 * max(0, batches - 1)
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in kept.items())
    assert files_of(out) == files_of(whole)
    last = Painter()
    assert not run(model, last, out).computed
    (out / "scores.json").unlink()  # killed before the scores: they are made again from the images
    assert run(model, last, out).computed
    assert last.drawn == []
    assert files_of(out) == files_of(whole)


def test_what_changes_the_images_changes_the_scores(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run(model, Painter(), out).computed
    assert not run(model, Painter(), out).computed
    assert not run(model, Painter(), out, SETTINGS.model_copy(update={"binding_scenes": 4})).computed
    for change in ({"guidance": 4.0}, {"guidance": 4.0, "weights": b"trained further"}):
        write_model(model, **change)
        before = {path.name for path in (out / "images").iterdir()}
        painter = Painter()
        assert run(model, painter, out).computed, change
        assert len(painter.drawn) == 12
        (now,) = (out / "images").iterdir()  # and those of the model as it was are gone
        assert {now.name} != before
    assert run(model, Painter(), out, SETTINGS.model_copy(update={"seed": 2})).computed


def test_scores_that_are_not_whole_are_made_again(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(model, Painter(), out)
    text = (out / "scores.json").read_text()
    for torn in (text[: len(text) // 2], "[]", "{}", '{"identity": 1}'):
        (out / "scores.json").write_text(torn)
        assert run(model, Painter(0), out).computed
    assert (out / "scores.json").read_text() == text


def test_scores_are_written_whole_and_last(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    run(model, Painter(), out)

    def killed(*_: object, **__: object) -> None:
        assert not (
            out / "scores.json"
        ).exists()  # results.jsonl is of the new settings now: the old ones must not stay
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluate, "publish_bytes", killed)
    with pytest.raises(KeyboardInterrupt):
        run(model, Painter(), out, SETTINGS.model_copy(update={"seed": 2}))
    assert (out / "results.jsonl").is_file()
    assert not (out / "scores.json").exists()


def test_a_broken_image_is_named(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(model, Painter(), out)
    (out / "scores.json").unlink()
    path = next(out.rglob("00001/samples/0001.png"))
    content = path.read_bytes()
    path.write_bytes(content[:40] + bytes(20) + content[60:])  # its end is there, so it counts as drawn
    with pytest.raises(
        InputError, match=rf"{path}: not readable as an image .* delete it and run the same command again"
    ):
        run(model, Painter(), out)


def test_a_model_folder_without_a_readable_index_is_refused(model: Path, tmp_path: Path) -> None:
    (model / "model_index.json").write_text('{"sampler": ')
    with pytest.raises(InputError, match=r"model_index\.json: not readable .* written by lidit train"):
        run(model, Painter(), tmp_path / "out")
