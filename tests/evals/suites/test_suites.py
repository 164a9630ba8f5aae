"""Official suites: exact layouts, resuming, and aggregates of hand-made result files whose answers
are known.
"""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lidit.errors import InputError
from lidit.evals.suites import geneval, t2i_compbench
from lidit.evals.suites.registry import parse_results, prepare_folder, suite_parts
from lidit.evals.suites.targets import (
    ImageTarget,
    claim_folder,
    missing,
    recorded_images,
    save_target,
    write_whole,
)


def picture(value: int, side: int = 8) -> np.ndarray:
    return np.full((side, side, 3), value, np.uint8)


def files_under(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


# ------------------------------------------------------------------------------------------------
# Shared


def test_images_are_whole_or_absent_and_missing_ones_are_listed(tmp_path: Path) -> None:
    targets = [
        ImageTarget(Path(f"a/{number}.png"), f"prompt {number}", (42,)) for number in range(4)
    ]
    assert missing(tmp_path, targets) == targets
    for target in targets[:2]:
        save_target(tmp_path, target, [picture(10)])
    assert missing(tmp_path, targets) == targets[2:]
    assert missing(tmp_path, targets)[1::2] == targets[3:]
    assert files_under(tmp_path) == ["a/0.png", "a/1.png"]
    with pytest.raises(InputError, match=r"a/2\.png: needs 1 uint8 images"):
        save_target(tmp_path, targets[2], [picture(1), picture(2)])
    with pytest.raises(InputError, match="of one size"):
        save_target(tmp_path, ImageTarget(Path("g.png"), "", (1, 2)), [picture(1), picture(2, 4)])


def test_a_file_that_was_cut_is_drawn_again(tmp_path: Path) -> None:
    targets = [ImageTarget(Path(f"a/{number}.png"), "prompt", (42,)) for number in range(3)]
    for target in targets:
        save_target(tmp_path, target, [picture(10)])
    assert missing(tmp_path, targets) == []
    (tmp_path / "a/0.png").write_bytes(b"")
    (tmp_path / "a/1.png").write_bytes((tmp_path / "a/1.png").read_bytes()[:-1])
    assert missing(tmp_path, targets) == targets[:2]


def test_a_folder_belongs_to_one_model_and_prompt_list(tmp_path: Path) -> None:
    identity = {"suite": "geneval", "model": "abc", "seed": 42}
    claim_folder(tmp_path / "out", identity, 8)
    claim_folder(tmp_path / "out", dict(reversed(identity.items())), 8)
    assert recorded_images(tmp_path / "out") == 8
    with pytest.raises(InputError, match="made with other model, seed"):
        claim_folder(tmp_path / "out", {"suite": "geneval", "model": "abd"}, 8)
    with pytest.raises(InputError, match="made with other images"):
        claim_folder(tmp_path / "out", identity, 4)
    # begun before the number was recorded
    (tmp_path / "out" / "suite.json").write_text(json.dumps(identity))
    assert recorded_images(tmp_path / "out") is None
    claim_folder(tmp_path / "out", identity, 8)
    assert recorded_images(tmp_path / "out") == 8
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("x")
    with pytest.raises(InputError, match=r"without suite\.json"):
        claim_folder(tmp_path / "other", {"suite": "geneval"}, 8)
    (tmp_path / "out" / "suite.json").write_text("[1")
    with pytest.raises(InputError, match=r"suite\.json: not readable"):
        recorded_images(tmp_path / "out")


KILLED_AT_SYNC = """
import os, signal, sys
from pathlib import Path
from lidit.evals.suites.targets import claim_folder
os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL)
claim_folder(Path(sys.argv[1]), {"suite": "geneval"}, 8)
"""


def test_a_process_killed_before_its_first_file_is_on_disk_leaves_a_folder_to_begin_again(
    tmp_path: Path,
) -> None:
    out = tmp_path / "out"
    killed = subprocess.run([sys.executable, "-c", KILLED_AT_SYNC, str(out)], check=False)
    assert killed.returncode == -9  # so the content is synced, and before it gets its name
    assert files_under(out) != []
    assert not (out / "suite.json").exists()
    claim_folder(out, {"suite": "geneval"}, 8)
    assert recorded_images(out) == 8
    write_whole(out, Path("samples/a.png"), b"x")
    assert [path.name for path in (out / "samples").iterdir()] == ["a.png"]


# ------------------------------------------------------------------------------------------------
# GenEval


def test_geneval_layout(tmp_path: Path) -> None:
    source = tmp_path / "prompts.jsonl"
    items = [
        {
            "tag": "colors",
            "include": [{"class": "car", "count": 1, "color": "red"}],
            "prompt": "a photo of a red car",
        },
        {
            "tag": "counting",
            "include": [{"class": "dog", "count": 2}],
            "prompt": "a photo of two dogs",
        },
    ]
    source.write_text("".join(json.dumps(item) + "\n" for item in items))
    assert geneval.read_prompts(source) == items
    targets, out = geneval.image_targets(items), tmp_path / "out"
    assert [target.seeds for target in targets] == [(42,), (43,), (44,), (45,)] * 2
    geneval.write_metadata(out, items)
    for target in targets:
        save_target(out, target, [picture(1)])
    names = ["metadata.jsonl", *(f"samples/{image:04d}.png" for image in range(4))]
    assert files_under(out) == [f"{number:05d}/{name}" for number in range(2) for name in names]
    assert json.loads((out / "00001/metadata.jsonl").read_text()) == items[1]
    source.write_text('{"tag": "colors"}\n')
    with pytest.raises(InputError, match=r"prompts\.jsonl:1: expected"):
        geneval.read_prompts(source)


def test_geneval_prompt_list_of_the_benchmark(shared_data: Path) -> None:
    items = geneval.read_prompts(shared_data / "geneval" / "evaluation_metadata.jsonl")
    targets = geneval.image_targets(items)
    assert (len(items), len(targets)) == (553, 2212)
    lines = (shared_data / "geneval" / "generation_prompts.txt").read_text().splitlines()
    assert [target.prompt for target in targets[::4]] == lines


def test_geneval_aggregates(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    rows = [
        *[("colors", f"p{number}", number != 3) for number in range(4) for _ in range(2)],  # 6 of 8
        ("position", "q0", True),
        ("position", "q0", False),
        ("position", "q1", False),
        ("position", "q1", False),  # 1 of 4, 1 of 2 prompts
    ]
    path.write_text(
        "".join(
            json.dumps(
                {
                    "tag": tag,
                    "correct": correct,
                    "metadata": json.dumps({"prompt": prompt}),
                    "prompt": prompt,
                }
            )
            + "\n"
            for tag, prompt, correct in rows
        )
    )
    summary = geneval.read_results(path)
    assert {tag: interval.value for tag, interval in summary.tags.items()} == {
        "colors": 0.75,
        "position": 0.25,
    }
    assert summary.overall == 0.5
    assert summary.correct_images == pytest.approx(7 / 12)
    assert summary.correct_prompts == pytest.approx(4 / 6)
    assert (summary.images, summary.prompts) == (12, 6)
    assert summary.metrics()["position"] == 0.25
    path.write_text('{"tag": "colors", "correct": "yes", "metadata": "{}"}\n')
    with pytest.raises(InputError, match="expected true or false"):
        geneval.read_results(path)


def test_geneval_tags_are_strings(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    for tag in (["colors"], 3, None, {}):
        path.write_text(json.dumps({"tag": tag, "correct": True, "metadata": "{}"}) + "\n")
        with pytest.raises(InputError, match=r"results\.jsonl:1: tag is .*, expected a string"):
            geneval.read_results(path)


def test_geneval_prompts_without_four_images_are_named(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    counts = {"a dog": 4, "a cat": 3, "two cows": 8}
    rows = [
        {"tag": "t", "correct": True, "metadata": p, "prompt": p}
        for p, n in counts.items()
        for _ in range(n)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    notes = parse_results("geneval", path).notes
    assert "2 prompts have not 4 images: 'a cat' (3), 'two cows' (8)" in notes
    assert "INCOMPLETE: 15 scored, 2212 in the benchmark" in notes
    for images, complete in ((15, True), (16, False)):
        claim_folder(tmp_path / str(images), {}, images)
        noted = [
            note
            for note in parse_results("geneval", path, drawn=tmp_path / str(images)).notes
            if "INCOM" in note
        ]
        assert noted == (
            [] if complete else [f"INCOMPLETE: 15 scored, 16 drawn in {tmp_path / '16'}"]
        )


# ------------------------------------------------------------------------------------------------
# T2I-CompBench


def test_t2i_compbench_layout(tmp_path: Path) -> None:
    source = tmp_path / "color_val.txt"
    source.write_text('a green bench and a blue bowl\nThe "old" cat sat.\n')
    prompts = t2i_compbench.read_prompts(source)
    targets = t2i_compbench.image_targets("color", prompts, per_prompt=2)
    assert [str(target.path) for target in targets] == [
        "color/samples/a green bench and a blue bowl_000000.png",
        "color/samples/a green bench and a blue bowl_000001.png",
        'color/samples/The "old" cat sat._000002.png',
        'color/samples/The "old" cat sat._000003.png',
    ]
    assert [target.seeds for target in targets] == [(42,), (43,), (42,), (43,)]
    # read back as the official scripts do
    for index, target in enumerate(targets):
        assert target.path.name.split("_")[0] == target.prompt
        assert int(target.path.name.split("_")[-1].split(".")[0]) == index
    for text, message in (
        ("a_b\n", "holds '_'"),
        ("a/b\n", "holds '_'"),
        ("a\n\nb\n", "txt:2: empty"),
        ("x" * 250, "too long"),
    ):
        source.write_text(text)
        with pytest.raises(InputError, match=message):
            t2i_compbench.read_prompts(source)
    with pytest.raises(InputError, match="'colour' is unknown"):
        t2i_compbench.image_targets("colour", prompts)


def test_t2i_compbench_prompt_lists(shared_data: Path) -> None:
    for category in t2i_compbench.RESULT_FILES:
        prompts = t2i_compbench.read_prompts(shared_data / "t2i_compbench" / f"{category}_val.txt")
        assert len(prompts) == 300
        assert (
            len({target.path for target in t2i_compbench.image_targets(category, prompts)}) == 3000
        )


def write_answers(path: Path, answers: list, ids: list[int] | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    records = [
        {"question_id": number, "answer": answer}
        for number, answer in zip(ids or range(len(answers)), answers)
    ]
    path.write_text(json.dumps(records))


def test_t2i_compbench_scores(tmp_path: Path) -> None:
    for category, answers in (
        ("color", ["0.5000"] * 10 + ["1.0000"] * 10),
        ("shape", [0.25] * 20),
        ("texture", [0.5] * 20),
    ):
        write_answers(tmp_path / category / "annotation_blip/vqa_result.json", answers)
    scores = {
        category: t2i_compbench.read_category(tmp_path, category)
        for category in ("color", "shape", "texture")
    }
    assert scores["color"].score.value == 0.75
    assert (scores["color"].score.low, scores["color"].score.high) == (0.5, 1.0)
    assert t2i_compbench.li_dit_average(scores) == 50.0
    assert t2i_compbench.li_dit_average({"color": scores["color"]}) is None
    path = tmp_path / "spatial/labels/annotation_obj_detection_2d/vqa_result.json"
    write_answers(path, [0.0] * 9 + [1.0], ids=[9, *range(9)])
    assert t2i_compbench.read_answers(path) == [0.0] * 8 + [1.0, 0.0]
    assert t2i_compbench.read_category(tmp_path, "spatial").score.value == pytest.approx(0.1)
    write_answers(path, [0.0] * 10, ids=[42] * 10)
    with pytest.raises(InputError, match="numbered without gaps"):
        t2i_compbench.read_category(tmp_path, "spatial")
    write_answers(path, [0.0] * 11)
    with pytest.raises(InputError, match="no multiple of 10"):
        t2i_compbench.read_category(tmp_path, "spatial")
    with pytest.raises(InputError, match="run the official numeracy scorer"):
        t2i_compbench.read_category(tmp_path, "numeracy")


def test_t2i_compbench_results_of_folders_drawn_in_part(tmp_path: Path) -> None:
    source, results = tmp_path / "color_val.txt", tmp_path / "color/annotation_blip/vqa_result.json"
    source.write_text("a red car\na blue dog\n")
    (part,) = suite_parts("t2i-compbench", [source])
    prepare_folder(tmp_path, part, {})
    for target in part.targets[:10]:
        save_target(tmp_path, target, [picture(1)])
    # the scorers number what they find: half a folder has ids without gaps too
    write_answers(results, [0.5] * 10)
    with pytest.raises(InputError, match="samples: 10 of 20 images; run the drawing again"):
        t2i_compbench.read_category(tmp_path, "color")
    for target in part.targets[10:]:
        save_target(tmp_path, target, [picture(1)])
    with pytest.raises(InputError, match=r"vqa_result\.json: 10 scores, 20 images; run the scorer"):
        t2i_compbench.read_category(tmp_path, "color")
    write_answers(results, [0.5] * 20)
    assert t2i_compbench.read_category(tmp_path, "color").recorded
    assert [
        note for note in parse_results("t2i-compbench", tmp_path).notes if "NOT CHECKED" in note
    ] == []
    (tmp_path / part.targets[3].path).write_bytes(b"")
    with pytest.raises(InputError, match="samples: 19 of 20 images"):
        t2i_compbench.read_category(tmp_path, "color")


def test_t2i_compbench_results_where_nothing_says_how_many(tmp_path: Path) -> None:
    results = tmp_path / "color/annotation_blip/vqa_result.json"
    write_answers(results, [0.5] * 10)
    notes = parse_results("t2i-compbench", tmp_path).notes
    assert any(note.startswith("NOT CHECKED") and "color (10)" in note for note in notes)
    for number in range(20):
        write_whole(tmp_path / "color", Path(f"samples/a_{number:06d}.png"), b"x")
    with pytest.raises(InputError, match="10 scores, 20 images"):
        t2i_compbench.read_category(tmp_path, "color")


def test_t2i_compbench_complex_needs_a_copy_before_the_official_script(tmp_path: Path) -> None:
    write_answers(
        tmp_path / "complex/labels/annotation_obj_detection_2d/vqa_result.json", [0.2] * 10
    )
    with pytest.raises(
        InputError,
        match="copy labels/annotation_obj_detection_2d to annotation_obj_detection before",
    ):
        t2i_compbench.read_category(tmp_path, "complex")
    write_answers(tmp_path / "complex/annotation_3_in_1/vqa_result.json", [0.4] * 10)
    assert t2i_compbench.read_category(tmp_path, "complex").score.value == pytest.approx(0.4)
