"""The official suites behind two questions: which images does a prompt list ask for, and what do results say.

Layouts and rules are each suite's own (`geneval`, `t2i_compbench`, `dpg_bench`); here they get one shape.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from lidit.errors import InputError
from lidit.evals import dpg_bench, geneval, t2i_compbench
from lidit.evals.suites import ImageTarget, claim_folder
from lidit.store import digest_of

SuiteName = Literal["geneval", "t2i-compbench", "dpg-bench"]
SUITES: tuple[str, ...] = get_args(SuiteName)
# LI-DiT-1B in the paper's table 1, in the units of our tables
PAPER = {
    "geneval": {"single_object": 0.98, "two_object": 0.69, "counting": 0.48, "colors": 0.86, "position": 0.22,
                "color_attr": 0.37, "overall": 0.60},
    "t2i-compbench": {"color": 0.7408, "shape": 0.5934, "texture": 0.6959, "spatial": 0.2757},
    "dpg-bench": {"overall": 81.65},
}  # fmt: skip


@dataclass(frozen=True)
class SuitePart:
    """The images of one prompt file. `folder`, relative to the output folder, holds them and nothing else.

    `digest` is of the prompts as read; `records` are GenEval's, which go beside the images.
    """

    folder: Path
    digest: str
    targets: tuple[ImageTarget, ...]
    records: tuple[Mapping[str, Any], ...] = ()


def check_suite(suite: str) -> None:
    if suite not in SUITES:
        raise InputError(f"suite {suite!r} is unknown: choose from {', '.join(SUITES)}")


def suite_parts(suite: str, prompts: Sequence[Path]) -> list[SuitePart]:
    """What to draw for the prompt files of a suite: one file, or for T2I-CompBench one per category.

    A T2I-CompBench category is recognised by its file's name (color_val.txt). Raises InputError for an unknown suite,
    for files that are not the suite's, and for two files of one category.
    """
    check_suite(suite)
    if suite == "t2i-compbench":
        parts = [_category_part(path) for path in prompts]
        if len({part.folder for part in parts}) != len(parts):
            raise InputError("two prompt files of one category would share a folder: give one per category")
        return parts
    if len(prompts) != 1:
        raise InputError(f"{suite} has one prompt file, {len(prompts)} were given")
    (path,) = prompts
    if suite == "geneval":
        records = geneval.read_prompts(path)
        targets = geneval.image_targets(records)
        return [SuitePart(Path(), digest_of({"prompts": records}), tuple(targets), tuple(records))]
    items = dpg_bench.read_prompts(path)
    return [SuitePart(Path(), digest_of({"prompts": items}), tuple(dpg_bench.image_targets(items)))]


def _category_part(path: Path) -> SuitePart:
    fitting = [name for name in t2i_compbench.RESULT_FILES if path.stem == name or path.stem.startswith(f"{name}_")]
    if not fitting:
        known = ", ".join(f"{name}_val.txt" for name in t2i_compbench.RESULT_FILES)
        raise InputError(f"{path}: no category in the file's name; T2I-CompBench's are {known}")
    category = max(fitting, key=len)
    prompts = t2i_compbench.read_prompts(path)
    targets = t2i_compbench.image_targets(category, prompts)
    return SuitePart(Path(category), digest_of({"prompts": prompts}), tuple(targets))


def prepare_folder(out: Path, part: SuitePart, identity: Mapping[str, object]) -> None:
    """Claims the part's folder for these prompts and this `identity` (model, sampler) and writes what goes beside the
    images. Raises InputError where the folder holds images made with others."""
    claim_folder(out / part.folder, {**identity, "prompts": part.digest})
    if part.records:
        geneval.write_metadata(out, part.records)


@dataclass(frozen=True)
class SuiteScores:
    """Official aggregates: flat numbers for a tracker, a Markdown table, and what a reader must know beside it."""

    metrics: dict[str, float]
    table: str
    notes: tuple[str, ...] = ()


def parse_results(suite: str, results: Path, graph: Path | None = None) -> SuiteScores:
    """The official aggregates of what a suite's scorer wrote.

    results: GenEval's results.jsonl; the folder with T2I-CompBench's categories; DPG-Bench's --res-path file. `graph`:
    dpg_bench.csv, for DPG-Bench's categories and its scores without the official script's two faults; the answers are
    read from the `_detail.txt` the scorer leaves beside its results. Raises InputError where they are not what they
    should be.
    """
    check_suite(suite)
    if graph is not None and suite != "dpg-bench":
        raise InputError(f"--csv is DPG-Bench's question graph; {suite} has none")
    if suite == "geneval":
        return _geneval(results)
    return _t2i_compbench(results) if suite == "t2i-compbench" else _dpg_bench(results, graph)


def _geneval(path: Path) -> SuiteScores:
    summary = geneval.read_results(path)
    paper = PAPER["geneval"]
    rows = [(tag, str(interval), paper.get(tag)) for tag, interval in summary.tags.items()]
    rows.append(("overall", f"{summary.overall:.3f}", paper["overall"]))
    notes = [
        f"{summary.images} images of {summary.prompts} prompts; correct images {summary.correct_images:.3f}, "
        f"prompts with any correct image {summary.correct_prompts:.3f}"
    ]
    if absent := [tag for tag in paper if tag not in summary.tags and tag != "overall"]:
        notes.append(f"overall is the mean of the categories present; {', '.join(absent)} are missing")
    return SuiteScores(summary.metrics(), _table(rows, "category"), tuple(notes))


def _t2i_compbench(folder: Path) -> SuiteScores:
    present = [name for name in t2i_compbench.RESULT_FILES if (folder / name).is_dir()]
    if not present:
        raise InputError(f"{folder}: no folder of a T2I-CompBench category; give the output folder of the drawing")
    scores = {name: t2i_compbench.read_category(folder, name) for name in present}
    rows = [(name, str(one.score), PAPER["t2i-compbench"].get(name)) for name, one in scores.items()]
    metrics = {name: one.score.value for name, one in scores.items()}
    notes = [f"{sum(one.images for one in scores.values())} images"]
    average = t2i_compbench.li_dit_average(scores)
    if average is not None:
        metrics["li_dit_average"] = average
        notes.append(f"the paper's average of color, shape and texture x 100: {average:.2f}; LI-DiT-1B 67.67")
    return SuiteScores(metrics, _table(rows, "category"), tuple(notes))


def _dpg_bench(path: Path, graph_path: Path | None) -> SuiteScores:
    items = dpg_bench.read_item_scores(path)
    reported = 100 * sum(items.values()) / len(items)
    paper = PAPER["dpg-bench"]["overall"]
    if graph_path is None:
        table = _table([("overall", f"{reported:.2f}", paper)], "score")
        return SuiteScores({"overall": reported}, table, (f"{len(items)} items; categories need --csv dpg_bench.csv",))
    graph = dpg_bench.read_graph(graph_path)
    answers = dpg_bench.read_details(path.with_name(f"{path.stem}_detail{path.suffix}"), graph)
    official = dpg_bench.score(graph, answers)
    repaired = dpg_bench.score(graph, answers, official_quirks=False)
    metrics = {**official.metrics(), **{f"repaired/{key}": value for key, value in repaired.metrics().items()}}
    rows: list[tuple[str, str, float | None]] = [("overall", f"{official.overall:.2f} | {repaired.overall:.2f}", paper)]
    for name in sorted({*official.broad, *repaired.broad}):
        pair = [f"{scores[name]:.2f}" if name in scores else "" for scores in (official.broad, repaired.broad)]
        rows.append((name, " | ".join(pair), None))
    notes = [f"{len(official.items)} items; the published way first, then without ELLA#60 and #61"]
    if official.dropped:
        notes.append(f"the official script fails on {', '.join(official.dropped)}")
    if abs(reported - official.overall) > 0.01:
        notes.append(f"the results file says {reported:.2f}, its answers give {official.overall:.2f}")
    return SuiteScores(metrics, _table(rows, "score", "published way | repaired"), tuple(notes))


def _table(rows: Sequence[tuple[str, str, float | None]], first: str, head: str = "this model") -> str:
    columns = head.count("|") + 3
    lines = [f"| {first} | {head} | LI-DiT-1B (paper) |", "|" + "---|" * columns]
    return "\n".join(
        lines + [f"| {name} | {score} | {'' if paper is None else paper} |" for name, score, paper in rows]
    )
