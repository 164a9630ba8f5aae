"""Evaluating a model folder: official layouts drawn by workers and resumed, binding."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lidit.config import EvaluateSettings, PoolSettings, TrackingSettings
from lidit.errors import InputError
from lidit.pipeline import LIDiTPipeline
from pipelines.evaluation.binding import evaluate_binding
from pipelines.evaluation.scenes import evaluate_scenes
from pipelines.evaluation.suites import sample_suite
from tests.helpers.command import lidit
from tests.helpers.random_model import write_model
from tests.helpers.trained import SmallWorld

PROMPTS = (
    "a photo of a red circle",
    "a photo of two squares",
    "a photo of a blue cross above a green circle",
)
TWO = PoolSettings(actors=2)


@pytest.fixture(scope="module")
def model(small_world: SmallWorld, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(small_world, tmp_path_factory.mktemp("evaluated") / "run", seed=1)


@pytest.fixture
def geneval_prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    records = [
        {"tag": "colors", "include": [{"class": "circle", "count": 1}], "prompt": text}
        for text in PROMPTS
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def batches_of(size: int) -> EvaluateSettings:
    return EvaluateSettings(batch_size=size)


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*.png"))}


def test_workers_this_machine_has_no_room_for_are_refused(
    model: Path, geneval_prompts: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="1 actors ask for 1 GPU, this machine offers 0"):
        sample_suite(
            model,
            "geneval",
            [geneval_prompts],
            batches_of(4),
            PoolSettings(gpus=1),
            tmp_path / "out",
        )


def test_geneval_is_drawn_in_its_layout_and_resumed(
    model: Path, small_world: SmallWorld, geneval_prompts: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    made = sample_suite(model, "geneval", [geneval_prompts], batches_of(5), TWO, out)
    assert (made.images, made.sampled) == (12, 12)
    images = files_of(out)
    assert set(images) == {f"{p:05d}/samples/{i:04d}.png" for p in range(3) for i in range(4)}
    assert json.loads((out / "00002/metadata.jsonl").read_text())["prompt"] == PROMPTS[2]
    # seeds 42, 43, 44 ...
    drawn = LIDiTPipeline.from_pretrained(model)(PROMPTS[1], seed=44, output_type="np")[0]
    shown = np.asarray(Image.open(out / "00001/samples/0002.png")).astype(int)
    assert abs(shown - 255 * drawn).max() <= 1
    assert len(set(images.values())) == 12

    lost = ("00000/samples/0003.png", "00002/samples/0000.png")
    for name in lost:
        (out / name).unlink()
    kept = {path: path.stat().st_mtime_ns for path in out.rglob("*.png")}
    again = sample_suite(model, "geneval", [geneval_prompts], batches_of(8), PoolSettings(), out)
    assert again.sampled == 2
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in kept.items())
    for name in lost:
        same = np.asarray(Image.open(out / name)).astype(int) - np.asarray(
            Image.open(_file(images[name], tmp_path))
        )
        assert abs(same).max() <= 1
    assert (
        sample_suite(
            model, "geneval", [geneval_prompts], batches_of(8), PoolSettings(), out
        ).sampled
        == 0
    )
    other = write_model(small_world, tmp_path / "other", seed=2)
    with pytest.raises(InputError, match="made with other model"):
        sample_suite(other, "geneval", [geneval_prompts], batches_of(12), PoolSettings(), out)


def _file(content: bytes, folder: Path) -> Path:
    path = folder / "one.png"
    path.write_bytes(content)
    return path


@pytest.mark.slow
def test_grids_and_categories(model: Path, tmp_path: Path) -> None:
    items = tmp_path / "prompts.jsonl"
    items.write_text('{"item_id": "partiprompts1", "prompt": "a red circle"}\n')
    assert (
        lidit("evaluate", model, "--suite", "dpg-bench", "--prompts", items, "--out", tmp_path) == 0
    )
    grid = np.asarray(Image.open(tmp_path / "dpg-bench/images/partiprompts1.png")).astype(int)
    assert grid.shape == (64, 64, 3)
    pipe = LIDiTPipeline.from_pretrained(model)
    corners = (grid[:32, :32], grid[:32, 32:], grid[32:, :32], grid[32:, 32:])
    for seed, corner in zip((42, 43, 44, 45), corners):
        assert abs(np.asarray(pipe("a red circle", seed=seed)[0]).astype(int) - corner).max() <= 1

    for name in ("color_val.txt", "3d_spatial_val.txt"):
        (tmp_path / name).write_text("a red circle.\na blue square\n")
    both = ["--prompts", tmp_path / "color_val.txt", "--prompts", tmp_path / "3d_spatial_val.txt"]
    assert (
        lidit(
            "evaluate",
            model,
            "--suite",
            "t2i-compbench",
            *both,
            "--workers",
            "2",
            "--out",
            tmp_path,
        )
        == 0
    )
    names = sorted(path.name for path in (tmp_path / "t2i-compbench/color/samples").iterdir())
    assert names[0] == "a blue square_000010.png"
    assert names[-1] == "a red circle._000009.png"
    assert len(list((tmp_path / "t2i-compbench/3d_spatial/samples").iterdir())) == 20
    twice = ["--prompts", tmp_path / "color_val.txt", "--prompts", tmp_path / "color_val.txt"]
    assert lidit("evaluate", model, "--suite", "t2i-compbench", *twice, "--out", tmp_path) == 2


def test_what_does_not_go_together_is_refused(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for words, message in (
        (["--parse", tmp_path], "belong to --suite"),
        (["--suite", "geneval"], "give --prompts FILE"),
        (["--suite", "geneval", "--binding", "--parse", tmp_path], "two jobs"),
        (["--suite", "geneva", "--parse", tmp_path], "choose from geneval"),
        (
            ["--suite", "t2i-compbench", "--prompts", tmp_path / "mine.txt"],
            "no category in the file's name",
        ),
        (
            ["--suite", "geneval", "--prompts", tmp_path, "per_tag=2"],
            "per_tag=2: not used by this measure",
        ),
        (["--binding", "tags=[colors]"], "it takes batch_size, binding_scenes, layout, seed"),
        (["--binding", "sampler.steps=3"], "sampler.steps=3: not used"),
        (["--workers", "2"], "--workers belongs to --suite"),
        (["--pictures", tmp_path, "--binding"], "three jobs"),
        (["sampler.steps=0"], "sampler.steps: Input should be greater than or equal to 1"),
        (["sampler.scheduler=ddim"], "ddim"),
    ):
        assert lidit("evaluate", model, *words) == 2, words
        assert message in capsys.readouterr().err


def test_binding_is_measured_from_a_folder(model: Path, tmp_path: Path) -> None:
    settings = EvaluateSettings(layout="simple", binding_scenes=8)
    first = evaluate_binding(model, settings, TrackingSettings(), tmp_path)
    assert first.computed
    assert {"attribute_colors_bare/accuracy", "relation_position_bare/gap"} <= set(first.metrics)
    # random weights: the loss does depend on the caption
    assert first.metrics["binding_color_attr_bare/gap"] != 0
    assert not evaluate_binding(model, settings, TrackingSettings(), tmp_path).computed
    free = evaluate_binding(
        model, EvaluateSettings(layout="free", binding_scenes=4), TrackingSettings(), tmp_path
    )
    assert "binding_list8_bare/accuracy_position_8" in free.metrics
    assert Image.open(tmp_path / "binding-positions.png").width > 100


def test_another_guidance_is_another_evaluation(model: Path, tmp_path: Path) -> None:
    def drawn(*overrides: str) -> tuple[dict[str, bytes], dict[str, object]]:
        words = ["tags=[colors]", "per_tag=2", *overrides, "--out", tmp_path]
        assert lidit("evaluate", model, *words) == 0
        return files_of(tmp_path / "images"), json.loads((tmp_path / "scores.json").read_text())[
            "made_with"
        ]["model"]

    own, made_with = drawn()
    stronger, other = drawn("sampler.guidance_scale=9")
    assert {**made_with["sampler"], "guidance_scale": 9.0} == other["sampler"]
    assert sorted(own.values()) != sorted(stronger.values())
    again, same = drawn(f"sampler.guidance_scale={made_with['sampler']['guidance_scale']}")
    assert (again, same) == (own, made_with)


def test_pictures_of_ones_own_are_preferred_or_not(
    model: Path, small_world: SmallWorld, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "evaluate",
        model,
        "--pictures",
        small_world.folder / "scenes",
        "pictures=12",
        "--out",
        tmp_path,
    ]
    assert lidit(*words) == 0
    assert re.search(
        r"prefer their own caption: 0\.\d+ \[.*\] of 12 pictures, chance 0\.5",
        capsys.readouterr().out,
    )
    assert Image.open(tmp_path / "held-out.png").width > 100
    stamp = (tmp_path / "held-out.png").stat().st_mtime_ns
    assert lidit(*words) == 0
    assert "already there" in capsys.readouterr().out
    assert (tmp_path / "held-out.png").stat().st_mtime_ns == stamp
    assert lidit(*words[:-3], "pictures=13", "--out", tmp_path) == 0
    assert (tmp_path / "held-out.png").stat().st_mtime_ns != stamp


def test_list_prompts_give_the_positional_curve(model: Path, tmp_path: Path) -> None:
    settings = EvaluateSettings(layout="free", tags=("list4",), per_tag=2)
    scores = evaluate_scenes(model, settings, TrackingSettings(), tmp_path)
    assert {"list4/position_4_of_4", "list4/drop", "list4/lax"} <= set(scores.metrics)
    assert Image.open(tmp_path / "positions.png").width > 100


def test_runs_are_compared_on_one_page(
    small_world: SmallWorld, model: Path, tmp_path: Path
) -> None:
    other = write_model(small_world, tmp_path / "other", seed=2)
    page = tmp_path / "page.html"
    words = ["--prompt", "a red circle", "--seeds", "2", "--out", page]
    assert lidit("report", model.parent, other.parent, *words) == 0
    text = page.read_text()
    assert text.count("<img src=") == 4
    # two models, two seeds: four pictures
    assert len(set(re.findall(r'<img src="([^"]+)"', text))) == 4
    assert lidit("report", model.parent, tmp_path, *words) == 2
