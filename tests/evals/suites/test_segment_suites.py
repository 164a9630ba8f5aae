"""The paper's segment prompts (A.3) as a suite: drawn in GenEval's layout, read back from a VQA
model's scores.
"""

import json
from pathlib import Path

import pytest

from lidit.errors import InputError
from lidit.evals.suites.registry import parse_results, prepare_folder, suite_parts
from lidit.evals.suites.targets import recorded_images


@pytest.fixture
def words(tmp_path: Path) -> list[Path]:
    """T2I-CompBench files of two categories, large enough for a thousand prompts of
    eight segments.
    """
    colors = [
        f"a {a} {n}a and a {a} {n}b"
        for a in ("red", "blue", "green")
        for n in ("cat", "dog", "car", "cup")
    ]
    textures = [
        f"a {a} {n}a and a {a} {n}b"
        for a in ("metallic", "wooden")
        for n in ("box", "hat", "bed", "pen")
    ]
    files = {
        "color_train.txt": colors[:6],
        "color_val.txt": colors[6:],
        "texture_val.txt": textures,
    }
    for name, lines in files.items():
        (tmp_path / name).write_text("\n".join(lines) + "\n")
    return [tmp_path / name for name in files]


@pytest.mark.parametrize("segments", [4, 8])
def test_prompts_are_drawn_with_their_questions(
    words: list[Path], tmp_path: Path, segments: int
) -> None:
    (part,) = suite_parts(f"segments{segments}", words)
    assert len({target.prompt for target in part.targets}) == 1000
    assert [str(target.path) for target in part.targets[3:5]] == [
        "00000/samples/0003.png",
        "00001/samples/0000.png",
    ]
    assert [target.seeds for target in part.targets[:4]] == [(42,), (43,), (44,), (45,)]
    assert suite_parts(f"segments{segments}", words) == [part]
    out = tmp_path / "out"
    prepare_folder(out, part, {"model": "m"})
    assert recorded_images(out) == 4000
    record = json.loads((out / "00999/metadata.jsonl").read_text())
    assert record["prompt"] == part.targets[-1].prompt
    assert len(record["segments"]) == segments
    assert all(one["question"].removesuffix("?") in record["prompt"] for one in record["segments"])
    stamp = (out / "00999/metadata.jsonl").stat().st_mtime_ns
    (out / "00998/metadata.jsonl").write_text("")
    prepare_folder(out, part, {"model": "m"})
    assert (out / "00999/metadata.jsonl").stat().st_mtime_ns == stamp
    assert json.loads((out / "00998/metadata.jsonl").read_text())["tag"] == f"list{segments}"


def test_files_without_attributes_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "spatial_val.txt"
    path.write_text("a dog on the left of a cat\n")
    with pytest.raises(
        InputError,
        match=r"spatial_val\.txt: no attributes in it; give .*color, shape and " r"texture",
    ):
        suite_parts("segments4", [path])


def test_scores_by_position(tmp_path: Path) -> None:
    path = tmp_path / "scores.jsonl"
    lines = [
        json.dumps({"prompt": number, "scores": [1, 0.75, 0.5, 0.25]})
        for number in range(1000)
        for _ in range(4)
    ]
    path.write_text("\n".join(lines) + "\n")
    scores = parse_results("segments4", path)
    assert scores.metrics["position_3_of_4"] == 0.5
    assert scores.metrics["drop"] == 0.75
    assert scores.notes == ("4000 images of 1000 prompts",)
    assert scores.curve is not None
    assert scores.curve.by_position[3].value == 0.25
    assert [line.split(" | ")[0] for line in scores.table.splitlines()[2:]] == [
        *(f"| segment {number}" for number in (1, 2, 3, 4)),
        "| first less last quarter",
    ]
    path.write_text("\n".join(lines[:-1]) + "\n")
    assert parse_results("segments4", path).notes[1:] == (
        "INCOMPLETE: 3999 scored, 4000 in the benchmark",
        "1 prompts have not 4 images: '00999' (3)",
    )
    with pytest.raises(
        InputError, match=r"scores\.jsonl: 4 scores per image, segments8 has 8 " r"segments"
    ):
        parse_results("segments8", path)
