"""The suites that are scored outside: which images a prompt list asks for, and what the scorer's
results say.

Each suite's layout and rules are in its own module (`geneval`, `t2i_compbench`, `dpg_bench`); this
module gives them one shape. `segments4` and `segments8` are the paper's prompts of adjective-noun
segments (A.3): made from T2I-CompBench's words, sampled in GenEval's layout with the questions in
each metadata.jsonl, scored by any VQA model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from lidit.config.fields import check_prompts
from lidit.errors import InputError, plain
from lidit.evals.scenes.positional import PositionalCurve, positional_curve, read_segment_scores
from lidit.evals.suites import dpg_bench, geneval, t2i_compbench
from lidit.evals.suites.segments import read_word_pool, segment_prompts
from lidit.evals.suites.targets import ImageTarget, claim_folder, recorded_images
from lidit.store import digest_of

SuiteName = Literal["geneval", "t2i-compbench", "dpg-bench", "segments4", "segments8"]
SUITES: tuple[str, ...] = get_args(SuiteName)
SEGMENTS = {"segments4": 4, "segments8": 8}  # as the paper reads them, and a harder variant
SEGMENT_PROMPTS = 1000  # as many as the paper's
# Image files of the whole prompt list.
FULL = {"geneval": 2212, "dpg-bench": 1065} | dict.fromkeys(SEGMENTS, 4 * SEGMENT_PROMPTS)
# LI-DiT-1B in the paper's table 1, in the units of our tables.
PAPER = {
    "geneval": {"single_object": 0.98, "two_object": 0.69, "counting": 0.48, "colors": 0.86,
                "position": 0.22,
                "color_attr": 0.37, "overall": 0.60},
    "t2i-compbench": {"color": 0.7408, "shape": 0.5934, "texture": 0.6959, "spatial": 0.2757},
    "dpg-bench": {"overall": 81.65},
}  # fmt: skip


@dataclass(frozen=True)
class SuitePart:
    """The images of one prompt file. `folder`, relative to the output folder, holds these images
    and nothing else.

    `digest` is of the prompts as read; `records` are GenEval's metadata, written beside the images.
    """

    folder: Path
    digest: str
    targets: tuple[ImageTarget, ...]
    records: tuple[Mapping[str, Any], ...] = ()


def check_suite(suite: str) -> None:
    if suite not in SUITES:
        raise InputError(f"suite {suite!r} is unknown: choose from {', '.join(SUITES)}")


def suite_parts(suite: str, prompts: Sequence[Path]) -> list[SuitePart]:
    """The images that the prompt files of a suite ask for: one file, or for T2I-CompBench one per
    category.

    A T2I-CompBench category is recognised by its file's name (color_val.txt). Segment prompts take
    their words from any number of T2I-CompBench files. Raises InputError for an unknown suite, for
    files that are not the suite's, and for two files of one category.
    """
    check_suite(suite)
    if suite in SEGMENTS:
        return [_segments_part(SEGMENTS[suite], prompts)]
    if suite == "t2i-compbench":
        parts = [_category_part(path) for path in prompts]
        if len({part.folder for part in parts}) != len(parts):
            raise InputError(
                "two prompt files of one category would share a folder: give one per category"
            )
        return parts
    if len(prompts) != 1:
        raise InputError(f"{suite} has one prompt file, {len(prompts)} were given")
    (path,) = prompts
    if suite == "geneval":
        records = geneval.read_prompts(path)
        check_prompts((record["prompt"] for record in records), str(path))
        return [_geneval_part(records)]
    items = dpg_bench.read_prompts(path)
    check_prompts(items.values(), str(path))
    return [SuitePart(Path(), digest_of({"prompts": items}), tuple(dpg_bench.image_targets(items)))]


def _geneval_part(records: Sequence[Mapping[str, Any]]) -> SuitePart:
    return SuitePart(
        Path(),
        digest_of({"prompts": records}),
        tuple(geneval.image_targets(records)),
        tuple(records),
    )


def _segments_part(segments: int, prompts: Sequence[Path]) -> SuitePart:
    files: dict[str, list[Path]] = {}
    for path in prompts:
        category = _category(path)
        if category not in t2i_compbench.LI_DIT_AVERAGE:
            raise InputError(
                f"{path}: no attributes in it; give T2I-CompBench's color, shape and texture files"
            )
        files.setdefault(category, []).append(path)
    pools = {category: read_word_pool(paths) for category, paths in files.items()}
    return _geneval_part(segment_prompts(pools, SEGMENT_PROMPTS, segments, seed=0))


def _category_part(path: Path) -> SuitePart:
    category = _category(path)
    prompts = t2i_compbench.read_prompts(path)
    targets = t2i_compbench.image_targets(category, prompts)
    return SuitePart(Path(category), digest_of({"prompts": prompts}), tuple(targets))


def _category(path: Path) -> str:
    fitting = [
        name
        for name in t2i_compbench.RESULT_FILES
        if path.stem == name or path.stem.startswith(f"{name}_")
    ]
    if not fitting:
        known = ", ".join(f"{name}_val.txt" for name in t2i_compbench.RESULT_FILES)
        raise InputError(f"{path}: no category in the file's name; T2I-CompBench's are {known}")
    return max(fitting, key=len)


def prepare_folder(out: Path, part: SuitePart, identity: Mapping[str, object]) -> None:
    """Claim the part's folder for these prompts and this `identity` (model, sampler); write
    GenEval's metadata.

    Raises InputError where the folder holds images of other prompts or another identity.
    """
    claim_folder(out / part.folder, {**identity, "prompts": part.digest}, len(part.targets))
    if part.records:
        geneval.write_metadata(out, part.records)


@dataclass(frozen=True)
class SuiteScores:
    """Official aggregates: flat numbers for a tracker, a Markdown table, and notes that a reader of
    it needs.

    `curve`: the score by position, of segment prompts only.
    """

    metrics: dict[str, float]
    table: str
    notes: tuple[str, ...] = ()
    curve: PositionalCurve | None = None


def parse_results(
    suite: str, results: Path, graph: Path | None = None, drawn: Path | None = None
) -> SuiteScores:
    """The official aggregates of what a suite's scorer wrote.

    results: GenEval's results.jsonl; the folder with T2I-CompBench's categories; DPG-Bench's
    --res-path file; for segment prompts a line {"prompt": number of the folder, "scores":
    [one per segment]} per image. `graph`: dpg_bench.csv, for DPG-Bench's categories and its scores
    without the official script's two faults; the answers are read from the `_detail.txt` that the
    scorer leaves beside its results. `drawn`: the folder of the sampled images, whose record says
    how many images to expect. Raises InputError for results that the scorer does not write.
    """
    check_suite(suite)
    if graph is not None and suite != "dpg-bench":
        raise InputError(f"--csv is DPG-Bench's question graph; {suite} has none")
    if suite == "geneval":
        return _geneval(results, drawn)
    if suite in SEGMENTS:
        return _segments(suite, results, drawn)
    return (
        _t2i_compbench(results) if suite == "t2i-compbench" else _dpg_bench(results, graph, drawn)
    )


def _completeness(suite: str, count: int, drawn: Path | None) -> list[str]:
    """A note where fewer or more images are scored than the prompt list asks for.

    A note and no error: `drawn` is only likely the folder of these results, and a part may be
    intended.
    """
    recorded = recorded_images(drawn) if drawn else None
    expected = FULL[suite] if recorded is None else recorded
    if count == expected:
        return []
    return [
        f"INCOMPLETE: {count} scored, {expected} "
        f"{'in the benchmark' if recorded is None else f'drawn in {drawn}'}"
    ]


def _some(names: Iterable[str], shown: int = 5) -> str:
    listed = list(names)
    return ", ".join(listed[:shown]) + (
        f" and {len(listed) - shown} more" if len(listed) > shown else ""
    )


def _uneven(images: Mapping[str, int]) -> list[str]:
    if not images:
        return []
    shown = _some(f"{prompt!r} ({count})" for prompt, count in images.items())
    return [f"{len(images)} prompts have not {geneval.IMAGES_PER_PROMPT} images: {shown}"]


def _geneval(path: Path, drawn: Path | None) -> SuiteScores:
    summary = geneval.read_results(path)
    paper = PAPER["geneval"]
    # A tag is whatever stands in the file: it must not end a cell of the table, nor steer a
    # terminal.
    rows = [
        (plain(tag).replace("|", "\\|"), str(mean), paper.get(tag))
        for tag, mean in summary.tags.items()
    ]
    rows.append(("overall", f"{summary.overall:.3f}", paper["overall"]))
    notes = [
        f"{summary.images} images of {summary.prompts} prompts; correct images "
        f"{summary.correct_images:.3f}, "
        f"prompts with any correct image {summary.correct_prompts:.3f}"
    ]
    notes += [*_completeness("geneval", summary.images, drawn), *_uneven(summary.uneven)]
    if absent := [tag for tag in paper if tag not in summary.tags and tag != "overall"]:
        notes.append(
            f"overall is the mean of the categories present; {', '.join(absent)} are missing"
        )
    return SuiteScores(summary.metrics(), _table(rows, "category"), tuple(notes))


def _t2i_compbench(folder: Path) -> SuiteScores:
    present = [name for name in t2i_compbench.RESULT_FILES if (folder / name).is_dir()]
    if not present:
        raise InputError(
            f"{folder}: no folder of a T2I-CompBench category; give the output folder of "
            "the drawing"
        )
    scores = {name: t2i_compbench.read_category(folder, name) for name in present}
    rows = [
        (name, str(category.score), PAPER["t2i-compbench"].get(name))
        for name, category in scores.items()
    ]
    metrics = {name: category.score.value for name, category in scores.items()}
    notes = [f"{sum(category.images for category in scores.values())} images"]
    if unknown := [
        f"{name} ({category.images})" for name, category in scores.items() if not category.recorded
    ]:
        notes.append(
            "NOT CHECKED: no suite.json says how many images there should be, counted are "
            f"{_some(unknown)}"
        )
    average = t2i_compbench.li_dit_average(scores)
    if average is not None:
        metrics["li_dit_average"] = average
        notes.append(
            f"the paper's average of color, shape and texture x 100: {average:.2f}; LI-DiT-1B 67.67"
        )
    return SuiteScores(metrics, _table(rows, "category"), tuple(notes))


def _segments(suite: str, path: Path, drawn: Path | None) -> SuiteScores:
    table, prompts = read_segment_scores(path)
    if table.shape[1] != SEGMENTS[suite]:
        raise InputError(
            f"{path}: {table.shape[1]} scores per image, {suite} has {SEGMENTS[suite]} segments"
        )
    curve = positional_curve(table, prompts)
    rows: list[tuple[str, str, float | None]] = [
        *(
            (f"segment {number}", str(interval), None)
            for number, interval in enumerate(curve.by_position, start=1)
        ),
        ("first less last quarter", str(curve.drop), None),
    ]
    counts = Counter(f"{prompt:05d}" for prompt in prompts)
    notes = [
        f"{curve.images} images of {curve.prompts} prompts",
        *_completeness(suite, curve.images, drawn),
        *_uneven(
            {
                prompt: count
                for prompt, count in counts.items()
                if count != geneval.IMAGES_PER_PROMPT
            }
        ),
    ]
    return SuiteScores(curve.metrics(), _table(rows, "position"), tuple(notes), curve)


def _dpg_bench(path: Path, graph_path: Path | None, drawn: Path | None) -> SuiteScores:
    items = dpg_bench.read_item_scores(path)
    reported = 100 * sum(items.values()) / len(items)
    paper = PAPER["dpg-bench"]["overall"]
    if graph_path is None:
        table = _table([("overall", f"{reported:.2f}", paper)], "score")
        incomplete = _completeness("dpg-bench", len(items), drawn)
        notes = [f"{len(items)} items; categories need --csv dpg_bench.csv"]
        notes += [
            f"{note}; one item the official script itself loses (ELLA#61)" for note in incomplete
        ]
        return SuiteScores({"overall": reported}, table, tuple(notes))
    graph = dpg_bench.read_graph(graph_path)
    answers = dpg_bench.read_details(path.with_name(f"{path.stem}_detail{path.suffix}"), graph)
    official = dpg_bench.score(graph, answers)
    repaired = dpg_bench.score(graph, answers, official_quirks=False)
    dpg_bench.check_one_run(path, items, official, repaired)
    metrics = {
        **official.metrics(),
        **{f"repaired/{key}": value for key, value in repaired.metrics().items()},
    }
    rows: list[tuple[str, str, float | None]] = [
        ("overall", f"{official.overall:.2f} | {repaired.overall:.2f}", paper)
    ]
    for name in sorted({*official.broad, *repaired.broad}):
        pair = [
            f"{scores[name]:.2f}" if name in scores else ""
            for scores in (official.broad, repaired.broad)
        ]
        rows.append((name, " | ".join(pair), None))
    notes = [f"{len(official.items)} items; the published way first, then without ELLA#60 and #61"]
    notes += _completeness("dpg-bench", len({*items, *official.dropped}), drawn)
    if absent := sorted(set(graph) - set(items) - set(official.dropped)):
        notes.append(
            f"{len(absent)} of the graph's {len(graph)} items have no result: {_some(absent)}"
        )
    if official.dropped:
        notes.append(f"the official script fails on {', '.join(official.dropped)}")
    if abs(reported - official.overall) > 0.01:
        notes.append(
            f"the results file says {reported:.2f}, its answers give {official.overall:.2f}"
        )
    return SuiteScores(metrics, _table(rows, "score", "published way | repaired"), tuple(notes))


def _table(
    rows: Sequence[tuple[str, str, float | None]], first: str, head: str = "this model"
) -> str:
    columns = head.count("|") + 3
    lines = [f"| {first} | {head} | LI-DiT-1B (paper) |", "|" + "---|" * columns]
    return "\n".join(
        lines
        + [
            f"| {name} | {score} | {'' if paper is None else paper} |"
            for name, score, paper in rows
        ]
    )
