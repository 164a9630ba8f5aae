"""Files that other programs wrote and somebody may have altered: each mistake is one line with the
file's name.
"""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from lidit.errors import InputError
from lidit.evals.records import read_record
from lidit.evals.scenes.positional import read_segment_scores
from lidit.evals.suites import dpg_bench, geneval
from lidit.evals.suites.registry import parse_results, suite_parts
from lidit.evals.suites.t2i_compbench import read_answers
from lidit.evals.suites.targets import IDENTITY_FILE, recorded_images

DEEP = {
    "brackets": "[" * 100_000,
    "closed": "[" * 5000 + "]" * 5000,
    "objects": '{"a":' * 3000 + "1" + "}" * 3000,
    "below the limit of Python": "[" * 80 + "]" * 80,
}
READERS: dict[str, Callable[[Path], object]] = {
    "geneval results": geneval.read_results,
    "geneval prompts": geneval.read_prompts,
    "dpg prompts": dpg_bench.read_prompts,
    "segment scores": read_segment_scores,
    "answers": read_answers,
}


@pytest.mark.parametrize("text", DEEP.values(), ids=DEEP)
@pytest.mark.parametrize("reader", READERS.values(), ids=READERS)
def test_deep_nesting_is_one_line(
    reader: Callable[[Path], object], text: str, tmp_path: Path
) -> None:
    path = tmp_path / "results.jsonl"
    facts = {
        "tag": "x",
        "correct": True,
        "metadata": "{}",
        "include": [],
        "prompt": 1,
        "item_id": "1",
        "scores": [1],
    }
    if reader == geneval.read_prompts:
        facts["prompt"] = "p"
    inside = json.dumps({**facts, "more": "MORE"}).replace('"MORE"', text)
    for content in (text, inside, f'[{{"question_id": 0, "answer": 1, "more": {text}}}]'):
        path.write_text(content)
        with pytest.raises(InputError) as caught:
            reader(path)
        assert "results.jsonl" in str(caught.value)
        assert len(str(caught.value).splitlines()) == 1
        assert len(str(caught.value)) < 400


def test_a_folder_record_of_deep_nesting_is_one_line(tmp_path: Path) -> None:
    (tmp_path / IDENTITY_FILE).write_text(DEEP["brackets"])
    with pytest.raises(InputError, match="not readable"):
        recorded_images(tmp_path)


def test_numbers_without_end_are_one_line(tmp_path: Path) -> None:
    path = tmp_path / "vqa_result.json"
    for answer in ("1" + "0" * 400, "1e999", "NaN"):
        path.write_text(f'[{{"question_id": 0, "answer": {answer}}}]')
        with pytest.raises(InputError, match="vqa_result"):
            read_answers(path)
    path.write_text('{"prompt": Infinity, "scores": [1]}')
    with pytest.raises(InputError, match=r"vqa_result.json:1"):
        read_segment_scores(path)


@pytest.mark.parametrize("suite", ["geneval", "dpg-bench"])
@pytest.mark.parametrize(
    "prompt", ["a \\ud800 cat", "a \\u0000 cat", "x" * 100_001], ids=["half", "NUL", "long"]
)
def test_prompts_of_a_suite_are_checked_as_captions_are(
    suite: str, prompt: str, tmp_path: Path
) -> None:
    path = tmp_path / "prompts.jsonl"
    good = {"tag": "x", "include": [], "item_id": "1", "prompt": "ein Würfel \U0001f600"}
    path.write_text(json.dumps(good))
    assert suite_parts(suite, [path])[0].targets[0].prompt == "ein Würfel \U0001f600"
    second = json.dumps({**good, "item_id": "2", "prompt": "PROMPT"}).replace("PROMPT", prompt)
    path.write_text(f"{json.dumps(good)}\n{second}\n")
    with pytest.raises(InputError, match=r"prompts.jsonl:( prompt)? ?2"):
        suite_parts(suite, [path])


def test_a_tag_cannot_end_its_cell_or_steer_the_terminal(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text(json.dumps({"tag": "two | <script>\x1b[2J", "correct": True, "metadata": "{}"}))
    scores = parse_results("geneval", path)
    assert "two \\| <script>\\x1b[2J |" in scores.table
    assert "\x1b" not in scores.table


def test_a_record_is_what_json_says() -> None:
    assert read_record('{"a": [1, "\\ud83d\\ude00", null]}') == {"a": [1, "\U0001f600", None]}
