"""DPG-Bench (TencentQQGYLab/ELLA): the grids its scorer reads, and its scores from the answers it writes.

Run the official scorer with `--image-root-path OUT/images --resolution R --pic-num 4 --res-path FILE.txt`; without
--res-path it writes its results among the images and then fails on them.

Two faults of the official script are open: it skips the first row of the question graph (ELLA#61), and its category
scores use the last crop's answers before the zeroing by parents (ELLA#60). Published numbers have both, so
`official_quirks=True` has them too; report both.
"""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lidit.errors import InputError
from lidit.evals.suites import FIRST_SEED, ImageTarget, read_lines

IMAGES_PER_PROMPT = 4
ITEM = re.compile(r"[A-Za-z0-9-]+")  # file names are ITEM.png, read up to the first "."
DETAIL = re.compile(r"(?P<path>.+?), \((?P<left>\d+), (?P<top>\d+), \d+, \d+\), (?P<rest>.*)")
ROW = re.compile(r"(?P<path>.+\.[A-Za-z]\w*)(?P<scores>(?:, [0-9][0-9.e+-]*){2,})")
COLUMNS = ("item_id", "proposition_id", "dependency", "tuple", "question_natural_language")


def read_prompts(path: Path) -> dict[str, str]:
    """item id -> prompt, from a JSON-lines file of {item_id, prompt} or the official folder of ITEM.txt files."""
    prompts: dict[str, str] = {}
    if path.is_dir():
        for file in sorted(path.glob("*.txt")):
            prompts[file.stem] = "\n".join(read_lines(file)).strip()
    else:
        for number, line in enumerate(read_lines(path), start=1):
            try:
                record = json.loads(line)
                item, prompt = str(record["item_id"]), str(record["prompt"])
            except (ValueError, KeyError, TypeError):
                raise InputError(f"{path}:{number}: expected a JSON object with item_id and prompt") from None
            if item in prompts:
                raise InputError(f"{path}:{number}: item {item!r} was there before")
            prompts[item] = prompt
    if not prompts:
        raise InputError(f"{path}: no prompts; give prompts.jsonl or the folder of ITEM.txt files")
    for item in prompts:
        if not ITEM.fullmatch(item):
            raise InputError(f"{path}: item id {item!r} cannot be a file name; only letters, digits and '-'")
    return prompts


def image_targets(prompts: Mapping[str, str], seed: int = FIRST_SEED) -> list[ImageTarget]:
    """`images/ITEM.png`: a 2 x 2 grid, rows first, of the images drawn with seed, seed + 1, ..."""
    seeds = tuple(seed + image for image in range(IMAGES_PER_PROMPT))
    return [ImageTarget(Path("images", f"{item}.png"), prompt, seeds, columns=2) for item, prompt in prompts.items()]


@dataclass(frozen=True)
class Question:
    """One proposition of an item; `parents` must hold for it to count. `first`: the CSV's first row (ELLA#61)."""

    number: int
    parents: tuple[int, ...]
    category: str  # "entity - whole"; the part before "-" is the broad category
    text: str
    first: bool


Graph = dict[str, list[Question]]
Answers = dict[str, list[dict[int, bool]]]  # item -> per crop, question -> answered yes


@dataclass(frozen=True)
class DPGScores:
    """`overall` = 100 x mean over items, and the categories x 100. `dropped`: items the official script fails on."""

    overall: float
    items: dict[str, float]
    broad: dict[str, float]
    detailed: dict[str, float]
    dropped: tuple[str, ...]

    def metrics(self) -> dict[str, float]:
        return {"overall": self.overall} | {f"category/{name}": value for name, value in self.broad.items()}


def read_graph(path: Path) -> Graph:
    """The question graph of `dpg_bench.csv`, every row of it. InputError names the file and row that do not fit."""
    graph: Graph = {}
    try:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            absent = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
            if absent:
                raise InputError(f"{path}: no column {', '.join(absent)}; give ELLA's dpg_bench.csv")
            for index, row in enumerate(reader):
                graph.setdefault(row["item_id"], []).append(_question(path, index, row))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: cannot be read: {error}") from None
    if not graph:
        raise InputError(f"{path}: no questions")
    for item, questions in graph.items():
        numbers = [question.number for question in questions]
        unknown = [parent for question in questions for parent in question.parents if parent not in numbers]
        if unknown or len(set(numbers)) != len(numbers):
            raise InputError(f"{path}: item {item}: repeated propositions, or parents {unknown} that do not exist")
    return graph


def _question(path: Path, index: int, row: Mapping[str, str]) -> Question:
    try:
        parents = tuple(int(part) for part in row["dependency"].split(",") if int(part) != 0)
        number = int(row["proposition_id"])
    except (ValueError, AttributeError, TypeError):
        raise InputError(f"{path}: data row {index + 1}: proposition_id and dependency must be numbers") from None
    category = row["tuple"].split("(")[0].strip()
    return Question(number, parents, category, row["question_natural_language"], first=index == 0)


def read_details(path: Path, graph: Graph) -> Answers:
    """The answers in the official scorer's `..._detail.txt`: "image, (crop), question, answer" per line.

    Questions are recognised by their text, since both may hold commas. Raises InputError for a line that fits no
    question of its item, and for an item answered in part.
    """
    answers: Answers = {}
    crops: dict[str, list[tuple[str, str]]] = {}
    for number, line in enumerate(read_lines(path), start=1):
        match = DETAIL.fullmatch(line)
        item = Path(match["path"]).name.split(".")[0] if match else ""
        if match is None or item not in graph:
            raise InputError(f"{path}:{number}: expected an item of the question graph, a crop, a question, an answer")
        corner = (match["top"], match["left"])
        known = crops.setdefault(item, [])
        if corner not in known:
            known.append(corner)
            answers.setdefault(item, []).append({})
        crop = answers[item][known.index(corner)]
        fitting = [q for q in graph[item] if match["rest"].startswith(f"{q.text}, ") and q.number not in crop]
        if not fitting:
            raise InputError(f"{path}:{number}: item {item} has no such question left: {match['rest']!r}")
        question = max(fitting, key=lambda q: len(q.text))
        crop[question.number] = match["rest"][len(question.text) + 2 :] == "yes"
    for item, groups in answers.items():
        required = {question.number for question in graph[item] if not question.first}
        for crop in groups:
            if absent := required - set(crop):
                raise InputError(
                    f"{path}: item {item}: no answer to proposition {min(absent)} in one crop; run it again"
                )
    return answers


def read_item_scores(path: Path) -> dict[str, float]:
    """item id -> the official item score (0 to 1) from the scorer's results file; its summary lines are left out."""
    scores = {}
    for line in read_lines(path):
        match = ROW.fullmatch(line)
        if match:
            values = [float(value) for value in match["scores"].split(", ")[1:]]
            if not math.isclose(values[-1], np.mean(values[:-1]), abs_tol=1e-6):
                raise InputError(f"{path}: {line!r}: the last number is not the mean of the others")
            scores[Path(match["path"]).name.split(".")[0]] = values[-1]
    if not scores:
        raise InputError(f"{path}: no line with an image and its scores; give the file named by --res-path")
    return scores


def score(graph: Graph, answers: Answers, official_quirks: bool = True) -> DPGScores:
    """DPG-Bench's scores from yes/no answers.

    A question whose parent scored 0 scores 0, in file order and so transitively; a crop is the mean of its questions,
    an item the mean of its crops. With `official_quirks` the CSV's first question is left out, an item with a question
    that depends on it is dropped, and categories take the last crop before zeroing; without, categories take all crops
    after zeroing, and the first question counts where it was answered.
    """
    items: dict[str, float] = {}
    categories: dict[str, list[float]] = {}
    dropped = []
    for item, crops in answers.items():
        questions = [q for q in graph[item] if not q.first or (not official_quirks and q.number in crops[0])]
        try:
            zeroed = [_zeroed(questions, crop, official_quirks) for crop in crops]
        except KeyError:
            dropped.append(item)
            continue
        items[item] = float(np.mean([np.mean(list(scores.values())) for scores in zeroed]))
        for q in questions:
            counted = [float(crops[-1][q.number])] if official_quirks else [scores[q.number] for scores in zeroed]
            categories.setdefault(q.category, []).extend(counted)
    if not items:
        raise InputError("no item of the question graph was answered")
    broad: dict[str, list[float]] = {}
    for category, values in categories.items():
        broad.setdefault(category.split("-")[0].strip(), []).extend(values)
    return DPGScores(
        overall=100 * float(np.mean(list(items.values()))),
        items=items,
        broad={name: 100 * float(np.mean(values)) for name, values in sorted(broad.items())},
        detailed={name: 100 * float(np.mean(values)) for name, values in sorted(categories.items())},
        dropped=tuple(dropped),
    )


def _zeroed(questions: Sequence[Question], crop: Mapping[int, bool], official_quirks: bool) -> dict[int, float]:
    """Scores with children of failed parents set to 0. KeyError at an unknown parent, as the official script raises."""
    scores = {q.number: float(crop[q.number]) for q in questions}
    for q in questions:
        for parent in q.parents:
            if (scores[parent] if official_quirks else scores.get(parent)) == 0:
                scores[q.number] = 0.0
                break
    return scores
