"""DPG-Bench (TencentQQGYLab/ELLA): the grids its scorer reads, and its scores from the answers it
writes.

Run the official scorer with `--image-root-path OUT/images --resolution R --pic-num 4 --res-path
FILE.txt`; without
--res-path it writes its results among the images and then fails on them, without --pic-num it looks
at one crop. It appends as it goes and writes its summary last: a file without the summary is of a
run that did not end.

Two faults of the official script are open: it skips the first row of the question graph (ELLA#61),
and its category scores use the last crop's answers before the zeroing by parents (ELLA#60).
Published numbers have both, so `official_quirks=True` has them too; report both.
"""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lidit.errors import InputError
from lidit.evals.records import read_record
from lidit.evals.suites.targets import FIRST_SEED, ImageTarget, read_lines

IMAGES_PER_PROMPT = 4
ITEM = re.compile(r"[A-Za-z0-9-]+")  # file names are ITEM.png, read up to the first "."
DETAIL = re.compile(r"(?P<path>.+?), \((?P<left>\d+), (?P<top>\d+), \d+, \d+\), (?P<rest>.*)")
NUMBER = r"\d+(?:\.\d+)?(?:e[+-]?\d+)?"
ROW = re.compile(rf"(?P<path>.+\.[A-Za-z]\w*)(?P<scores>(?:, {NUMBER})+)")
SUMMARY = ("Model: ", "L1 category scores:")  # what its first line starts with
TOTAL = re.compile(rf"DPG-Bench score: (?P<total>{NUMBER})")
COLUMNS = ("item_id", "proposition_id", "dependency", "tuple", "question_natural_language")


def read_prompts(path: Path) -> dict[str, str]:
    """item id -> prompt, from a JSON-lines file of {item_id, prompt} or the official folder of
    ITEM.txt files.
    """
    prompts: dict[str, str] = {}
    if path.is_dir():
        for file in sorted(path.glob("*.txt")):
            prompts[file.stem] = "\n".join(read_lines(file)).strip()
    else:
        for number, line in enumerate(read_lines(path), start=1):
            try:
                record = read_record(line)
                item, prompt = str(record["item_id"]), str(record["prompt"])
            except (ValueError, KeyError, TypeError):
                raise InputError(
                    f"{path}:{number}: expected a JSON object with item_id and prompt"
                ) from None
            if item in prompts:
                raise InputError(f"{path}:{number}: item {item!r} was there before")
            prompts[item] = prompt
    if not prompts:
        raise InputError(f"{path}: no prompts; give prompts.jsonl or the folder of ITEM.txt files")
    for item in prompts:
        if not ITEM.fullmatch(item):
            raise InputError(
                f"{path}: item id {item!r} cannot be a file name; only letters, digits and '-'"
            )
    return prompts


def image_targets(prompts: Mapping[str, str], seed: int = FIRST_SEED) -> list[ImageTarget]:
    """`images/ITEM.png`: a 2 x 2 grid, rows first, of the images drawn with seed, seed + 1, ..."""
    seeds = tuple(seed + image for image in range(IMAGES_PER_PROMPT))
    return [
        ImageTarget(Path("images", f"{item}.png"), prompt, seeds, columns=2)
        for item, prompt in prompts.items()
    ]


@dataclass(frozen=True)
class Question:
    """One proposition of an item; `parents` must hold for it to count. `first`: the CSV's first row
    (ELLA#61).
    """

    number: int
    parents: tuple[int, ...]
    category: str  # "entity - whole"; the part before "-" is the broad category
    text: str
    first: bool


Graph = dict[str, list[Question]]
Answers = dict[str, list[dict[int, bool]]]  # item -> per crop, question -> answered yes


@dataclass(frozen=True)
class DPGScores:
    """`overall` = 100 x mean over items, and the categories x 100. `dropped`: items without a
    score, since the official script fails on them.
    """

    overall: float
    items: dict[str, float]
    broad: dict[str, float]
    detailed: dict[str, float]
    dropped: tuple[str, ...]

    def metrics(self) -> dict[str, float]:
        return {"overall": self.overall} | {
            f"category/{name}": value for name, value in self.broad.items()
        }


def read_graph(path: Path) -> Graph:
    """The question graph of `dpg_bench.csv`, every row of it. InputError names the file and row
    that do not fit.
    """
    graph: Graph = {}
    try:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            absent = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
            if absent:
                raise InputError(
                    f"{path}: no column {', '.join(absent)}; give ELLA's dpg_bench.csv"
                )
            for index, row in enumerate(reader):
                where = f"{path}:{reader.line_num}"
                graph.setdefault(row["item_id"], []).append(_question(where, row, first=index == 0))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: cannot be read: {error}") from None
    if not graph:
        raise InputError(f"{path}: no questions")
    for item, questions in graph.items():
        numbers = [question.number for question in questions]
        unknown = [
            parent for question in questions for parent in question.parents if parent not in numbers
        ]
        if unknown or len(set(numbers)) != len(numbers):
            raise InputError(
                f"{path}: item {item}: repeated propositions, or parents {unknown} that do "
                "not exist"
            )
    return graph


def _question(where: str, row: Mapping[str | None, Any], first: bool) -> Question:
    # DictReader's marks of a row too short, and too long
    if None in row or any(row[name] is None for name in COLUMNS):
        raise InputError(
            f"{where}: {'more' if None in row else 'fewer'} fields than columns; fetch the "
            "file again"
        )
    try:
        parents = tuple(int(part) for part in row["dependency"].split(",") if int(part) != 0)
        number = int(row["proposition_id"])
    except (ValueError, AttributeError, TypeError):
        raise InputError(f"{where}: proposition_id and dependency must be numbers") from None
    return Question(
        number, parents, row["tuple"].split("(")[0].strip(), row["question_natural_language"], first
    )


def read_details(path: Path, graph: Graph) -> Answers:
    """The answers in the official scorer's `..._detail.txt`: "image, (crop), question, answer" per
    line.

    Questions are recognised by their text, since both may hold commas. Raises InputError for a line
    that fits no question of its item, and for an item answered in part: not all questions of a
    crop, or not all four crops. The script stops within an item that needs the question it skipped
    (ELLA#61): of such an item fewer crops are enough.
    """
    answers: Answers = {}
    crops: dict[str, list[tuple[str, str]]] = {}
    for number, line in enumerate(read_lines(path), start=1):
        match = DETAIL.fullmatch(line)
        item = Path(match["path"]).name.split(".")[0] if match else ""
        if match is None or item not in graph:
            raise InputError(
                f"{path}:{number}: expected an item of the question graph, a crop, a "
                "question, an answer"
            )
        corner = (match["top"], match["left"])
        known = crops.setdefault(item, [])
        if corner not in known:
            known.append(corner)
            answers.setdefault(item, []).append({})
        crop = answers[item][known.index(corner)]
        fitting = [
            q
            for q in graph[item]
            if match["rest"].startswith(f"{q.text}, ") and q.number not in crop
        ]
        if not fitting:
            raise InputError(
                f"{path}:{number}: item {item} has no such question left: {match['rest']!r}"
            )
        question = max(fitting, key=lambda q: len(q.text))
        crop[question.number] = match["rest"][len(question.text) + 2 :] == "yes"
    for item, groups in answers.items():
        required = {question.number for question in graph[item] if not question.first}
        for crop in groups:
            if absent := required - set(crop):
                raise InputError(
                    f"{path}: item {item}: no answer to proposition {min(absent)} in one crop; "
                    "run it again"
                )
        if len(groups) > IMAGES_PER_PROMPT or (
            len(groups) < IMAGES_PER_PROMPT and not _needs_first(graph[item])
        ):
            raise InputError(
                f"{path}: item {item}: answers on {len(groups)} crops, not {IMAGES_PER_PROMPT}; "
                "run it again with "
                f"--pic-num {IMAGES_PER_PROMPT} on whole grids"
            )
    return answers


def _needs_first(questions: Sequence[Question]) -> bool:
    skipped = {question.number for question in questions if question.first}
    return any(skipped & set(question.parents) for question in questions)


def read_item_scores(path: Path) -> dict[str, float]:
    """item id -> the official item score (0 to 1) from the scorer's results file.

    Raises InputError for a file of a run that did not end or looked at another number of crops, and
    where the rows do not have the mean that the summary gives.
    """
    scores: dict[str, float] = {}
    totals: list[str] = []
    summary = False
    for number, line in enumerate(read_lines(path), start=1):
        summary = summary or line.startswith(SUMMARY)
        if total := TOTAL.fullmatch(line):
            totals.append(total["total"])
        elif line.strip() and not summary:
            item, value = _row(f"{path}:{number}", line)
            if item in scores:
                raise InputError(
                    f"{path}:{number}: item {item} was there before: results of two runs; "
                    "run it again"
                )
            scores[item] = value
    if not scores:
        raise InputError(
            f"{path}: no line with an image and its scores; give the file named by --res-path"
        )
    if len(totals) != 1:
        raise InputError(
            f'{path}: {len(totals)} lines "DPG-Bench score: ..." after {len(scores)} items, not '
            "1: the scorer did not "
            "run to its end; run it again"
        )
    mean, decimals = 100 * float(np.mean(list(scores.values()))), len(totals[0].partition(".")[2])
    # forks print rounded numbers
    if abs(mean - float(totals[0])) > max(1e-6, 0.51 * 10**-decimals):
        raise InputError(
            f"{path}: its {len(scores)} items have the mean {mean:.4f}, its summary says "
            f"{totals[0]}: items are "
            "missing or of another run; run it again"
        )
    return scores


def _row(where: str, line: str) -> tuple[str, float]:
    match = ROW.fullmatch(line)
    if match is None:
        raise InputError(
            f"{where}: {line!r} is neither an image with its scores nor the summary; run it again"
        )
    *crops, mean = (float(value) for value in match["scores"].split(", ")[1:])
    if len(crops) != IMAGES_PER_PROMPT:
        raise InputError(
            f"{where}: scores of {len(crops)} crops, not {IMAGES_PER_PROMPT}; run it again with "
            "--pic-num "
            f"{IMAGES_PER_PROMPT}"
        )
    if not math.isclose(mean, np.mean(crops), abs_tol=1e-6):
        raise InputError(
            f"{where}: {line!r}: the last number is not the mean of the others; run it again"
        )
    return Path(match["path"]).name.split(".")[0], mean


def score(graph: Graph, answers: Answers, official_quirks: bool = True) -> DPGScores:
    """DPG-Bench's scores from yes/no answers.

    A question whose parent scored 0 scores 0, in file order and so transitively; a crop is the mean
    of its questions, an item the mean of its crops. With `official_quirks` the CSV's first question
    is left out, an item with a question that depends on it is dropped, and categories take the last
    crop before zeroing; without, categories take all crops after zeroing, and the first question
    counts where it was answered. An item without questions, or one that the script left after fewer
    than four crops, is dropped both ways. InputError where no item is left.
    """
    items: dict[str, float] = {}
    categories: dict[str, list[float]] = {}
    dropped = []
    for item, crops in answers.items():
        questions = [
            q for q in graph[item] if not q.first or (not official_quirks and q.number in crops[0])
        ]
        try:
            zeroed = [_zeroed(questions, crop, official_quirks) for crop in crops]
        except KeyError:
            zeroed = []
        if not questions or len(zeroed) < IMAGES_PER_PROMPT:
            dropped.append(item)
            continue
        items[item] = float(np.mean([np.mean(list(scores.values())) for scores in zeroed]))
        for q in questions:
            counted = (
                [float(crops[-1][q.number])]
                if official_quirks
                else [scores[q.number] for scores in zeroed]
            )
            categories.setdefault(q.category, []).extend(counted)
    if not items:
        raise InputError(
            "no item of the question graph was answered in full; run the official scorer on "
            "all images"
        )
    broad: dict[str, list[float]] = {}
    for category, values in categories.items():
        broad.setdefault(category.split("-")[0].strip(), []).extend(values)
    return DPGScores(
        overall=100 * float(np.mean(list(items.values()))),
        items=items,
        broad={name: 100 * float(np.mean(values)) for name, values in sorted(broad.items())},
        detailed={
            name: 100 * float(np.mean(values)) for name, values in sorted(categories.items())
        },
        dropped=tuple(dropped),
    )


def check_one_run(
    path: Path, rows: Mapping[str, float], official: DPGScores, repaired: DPGScores
) -> None:
    """InputError where the item scores of the results file `path` do not follow from the answers in
    its detail file.

    The repaired way counts too: it is what a scorer without ELLA#61 writes.
    """
    for item in sorted({*rows, *official.items}):
        expected = [scores.items[item] for scores in (official, repaired) if item in scores.items]
        if item not in rows or not any(
            math.isclose(rows[item], value, abs_tol=1e-6) for value in expected
        ):
            row, answers = rows.get(item, "none"), expected[0] if expected else "none"
            raise InputError(
                f"{path}: item {item}: score {row}, from the detail file's answers {answers}: "
                "the two files are not of "
                "one run; run the scorer again"
            )


def _zeroed(
    questions: Sequence[Question], crop: Mapping[int, bool], official_quirks: bool
) -> dict[int, float]:
    """Scores with children of failed parents set to 0. KeyError at an unknown parent, as the
    official script raises.
    """
    scores = {q.number: float(crop[q.number]) for q in questions}
    for q in questions:
        for parent in q.parents:
            if (scores[parent] if official_quirks else scores.get(parent)) == 0:
                scores[q.number] = 0.0
                break
    return scores
