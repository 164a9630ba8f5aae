"""DPG-Bench: its layout, and its scores of hand-made answers, question graphs and results files,
whole and broken.
"""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lidit.errors import InputError
from lidit.evals.suites import dpg_bench
from lidit.evals.suites.registry import parse_results
from lidit.evals.suites.targets import claim_folder, save_target

CSV = """item_id,text,keywords,proposition_id,dependency,category_broad,category_detailed,tuple,\
question_natural_language
first1,t,k,1,0,entity,whole,entity - whole (cat),Is there a cat?
first1,t,k,2,1,attribute,color,"attribute - color (cat, red)","Is the cat red, or reddish?"
whoops7,t,k,1,0,entity,whole,entity - whole (dog),Is there a dog?
whoops7,t,k,2,1,attribute,color,"attribute - color (dog, blue)",Is the dog blue?
whoops7,t,k,3,"1,2",relation,spatial,"relation - spatial (dog, mat, on)",Is the blue dog on a mat?
whoops7,t,k,4,0,entity,whole,entity - whole (mat),Is there a mat?
plain,t,k,1,0,entity,whole,entity - whole (sun),Is there a sun?
"""


@pytest.fixture
def graph(tmp_path: Path) -> dpg_bench.Graph:
    path = tmp_path / "dpg_bench.csv"
    path.write_text(CSV)
    return dpg_bench.read_graph(path)


def details(path: Path, answers: dict[str, list[dict[str, str]]]) -> Path:
    """As the official script writes them: crops in its order, questions in the order of the CSV."""
    corners = [(0, 0), (512, 0), (0, 512), (512, 512)]
    lines = []
    for item, crops in answers.items():
        for (left, top), crop in zip(corners, crops):
            box = (left, top, left + 512, top + 512)
            lines += [
                f"some, folder/{item}.png, {box}, {question}, {answer}"
                for question, answer in crop.items()
            ]
    path.write_text("\n".join(lines) + "\n")
    return path


DOG = ("Is there a dog?", "Is the dog blue?", "Is the blue dog on a mat?", "Is there a mat?")


def whoops(*patterns: str) -> list[dict[str, str]]:
    return [
        dict(zip(DOG, ("yes" if letter == "y" else "no" for letter in pattern)))
        for pattern in patterns
    ]


def test_dpg_layout(tmp_path: Path) -> None:
    source = tmp_path / "prompts.jsonl"
    source.write_text(
        '{"item_id": "0", "prompt": "A field."}\n{"item_id": "whoops7", "prompt": "A dog."}\n'
    )
    prompts = dpg_bench.read_prompts(source)
    targets, out = dpg_bench.image_targets(prompts), tmp_path / "out"
    for target in targets:
        assert target.seeds == (42, 43, 44, 45)
        save_target(
            out, target, [np.full((8, 8, 3), value, np.uint8) for value in (10, 20, 30, 40)]
        )
    assert sorted(path.name for path in (out / "images").iterdir()) == ["0.png", "whoops7.png"]
    grid = np.asarray(Image.open(out / "images" / "0.png"))
    assert grid.shape == (16, 16, 3)
    # top left, top right, bottom left, bottom right
    assert [int(grid[y, x, 0]) for y, x in ((0, 0), (0, 8), (8, 0), (8, 8))] == [10, 20, 30, 40]
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "0.txt").write_text("A field.\n")
    assert dpg_bench.read_prompts(tmp_path / "folder") == {"0": "A field."}
    for text, message in (
        ('{"item_id": "../x", "prompt": "p"}', "cannot be a file name"),
        ('{"item_id": "a", "prompt": "p"}\n{"item_id": "a", "prompt": "q"}', "was there before"),
        ('{"prompt": "p"}', "expected a JSON object"),
    ):
        source.write_text(text)
        with pytest.raises(InputError, match=message):
            dpg_bench.read_prompts(source)


def test_dpg_prompt_list(shared_data: Path) -> None:
    prompts = dpg_bench.read_prompts(shared_data / "dpg_bench" / "prompts.jsonl")
    assert len(dpg_bench.image_targets(prompts)) == 1065


def test_dpg_parents_that_fail_zero_their_children(graph: dpg_bench.Graph, tmp_path: Path) -> None:
    # no dog: blue and on-a-mat count 0 whatever was answered, the mat stands alone
    path = details(tmp_path / "d.txt", {"whoops7": whoops("nyyy", "ynyy", "yyny", "yyyy")})
    answers = dpg_bench.read_details(path, graph)
    assert answers["whoops7"][0] == {1: False, 2: True, 3: True, 4: True}
    result = dpg_bench.score(graph, answers)
    assert result.items["whoops7"] == pytest.approx((0.25 + 0.5 + 0.75 + 1) / 4)
    assert result.overall == pytest.approx(62.5)


def test_dpg_zeroing_is_transitive(tmp_path: Path) -> None:
    path = tmp_path / "chain.csv"
    header = CSV.splitlines()[0]
    rows = [
        "skip,t,k,1,0,e,w,entity - whole (z),Z?",
        *(f"c,t,k,{n},{n - 1},e,w,entity - whole (x{n}),X{n}?" for n in (1, 2, 3)),
    ]
    path.write_text("\n".join([header, *rows]) + "\n")
    result = dpg_bench.score(dpg_bench.read_graph(path), {"c": [{1: False, 2: True, 3: True}] * 4})
    assert result.items == {"c": 0.0}


def test_dpg_category_scores_with_and_without_the_official_quirk(graph: dpg_bench.Graph) -> None:
    answers = {
        "whoops7": [{1: True, 2: True, 3: True, 4: False}] * 3
        + [{1: False, 2: True, 3: True, 4: False}]
    }
    official = dpg_bench.score(graph, answers)
    # only the last crop, before zeroing: dog no, mat no; blue yes; on a mat yes
    assert official.detailed == {
        "attribute - color": 100,
        "entity - whole": 0,
        "relation - spatial": 100,
    }
    fair = dpg_bench.score(graph, answers, official_quirks=False)
    assert fair.detailed == {
        "attribute - color": 75,
        "entity - whole": 37.5,
        "relation - spatial": 75,
    }
    assert fair.broad == {"attribute": 75, "entity": 37.5, "relation": 75}
    assert fair.overall == official.overall == pytest.approx(100 * (3 * 0.75 + 0) / 4)


def test_dpg_first_row_is_skipped_and_its_item_dropped_where_others_depend_on_it(
    graph: dpg_bench.Graph,
) -> None:
    answers = {"first1": [{1: True, 2: True}] * 4, "plain": [{1: False}] * 4}
    official = dpg_bench.score(graph, answers)
    assert (official.overall, official.dropped) == (0.0, ("first1",))
    fair = dpg_bench.score(graph, answers, official_quirks=False)
    assert (fair.overall, fair.dropped) == (50.0, ())
    # the official scorer never asked the first question: the rest of the item still counts
    unasked = dpg_bench.score(graph, {"first1": [{2: True}] * 4}, official_quirks=False)
    assert unasked.items == {"first1": 1.0}
    # it stopped after the first crop, for want of the parent's answer: one crop is no item's score
    stopped = {"first1": [{2: True}], "plain": [{1: True}] * 4}
    for quirks in (True, False):
        result = dpg_bench.score(graph, stopped, official_quirks=quirks)
        assert (result.overall, result.dropped) == (100.0, ("first1",))


def test_dpg_item_with_the_first_row_only_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "g.csv"
    path.write_text(
        "\n".join(line for line in CSV.splitlines() if not line.startswith("first1,t,k,2")) + "\n"
    )
    answers = {"first1": [{1: True}] * 4, "plain": [{1: False}] * 4}
    graph = dpg_bench.read_graph(path)
    official = dpg_bench.score(graph, answers)
    assert (official.overall, official.dropped) == (0.0, ("first1",))
    assert dpg_bench.score(graph, answers, official_quirks=False).overall == 50.0
    with pytest.raises(InputError, match="no item of the question graph was answered in full"):
        dpg_bench.score(graph, {"first1": [{1: True}] * 4})


def test_dpg_answers_with_commas_and_incomplete_files(
    graph: dpg_bench.Graph, tmp_path: Path
) -> None:
    path = details(tmp_path / "d.txt", {"first1": [{"Is the cat red, or reddish?": "yes"}] * 4})
    assert dpg_bench.read_details(path, graph) == {"first1": [{2: True}] * 4}
    # the script stops within this item after the first crop
    path = details(tmp_path / "d.txt", {"first1": [{"Is the cat red, or reddish?": "yes, it is"}]})
    # only exactly "yes" counts
    assert dpg_bench.read_details(path, graph) == {"first1": [{2: False}]}
    path = details(tmp_path / "d.txt", {"whoops7": [dict(list(whoops("yyyy")[0].items())[:3])]})
    with pytest.raises(InputError, match="no answer to proposition 4"):
        dpg_bench.read_details(path, graph)
    for crops in (1, 2, 3):  # --pic-num 1 is the script's default
        path = details(tmp_path / "d.txt", {"whoops7": whoops(*["yyyy"] * crops)})
        with pytest.raises(
            InputError,
            match=rf"d\.txt: item whoops7: answers on {crops} crops, not 4.*--pic-num " r"4",
        ):
            dpg_bench.read_details(path, graph)
    path = details(tmp_path / "d.txt", {"whoops7": whoops(*["yyyy"] * 4)})
    path.write_text(
        path.read_text()
        + "".join(f"i/whoops7.png, (9, 9, 1, 1), {question}, yes\n" for question in DOG)
    )
    with pytest.raises(InputError, match="answers on 5 crops, not 4"):
        dpg_bench.read_details(path, graph)
    path = details(tmp_path / "d.txt", {"plain": [{"Is there a moon?": "yes"}]})
    with pytest.raises(InputError, match="no such question left"):
        dpg_bench.read_details(path, graph)
    path.write_text("nonsense\n")
    with pytest.raises(InputError, match=r"d\.txt:1: expected an item"):
        dpg_bench.read_details(path, graph)


def test_dpg_results_file_of_the_scorer(tmp_path: Path) -> None:
    path = tmp_path / "results.txt"
    path.write_text(
        "some, folder/whoops7.png, 0.25, 0.5, 0.75, 1.0, 0.625\nsome, folder/plain.png, 0.0, "
        "0.0, 0.0, 0.0, 0.0\n"
        "Model: x\nL1 category scores:\n\tentity: 50.0\nImage path: some, folder\nDPG-Bench "
        "score: 31.25\n"
    )
    assert dpg_bench.read_item_scores(path) == {"whoops7": 0.625, "plain": 0.0}
    path.write_text("Model: x\n")
    with pytest.raises(InputError, match="--res-path"):
        dpg_bench.read_item_scores(path)


def test_dpg_results_of_a_run_that_did_not_end_or_was_another(tmp_path: Path) -> None:
    path = tmp_path / "results.txt"
    rows = "i/a.png, 1.0, 0.5, 1.0, 0.5, 0.75\ni/b.png, 0.5, 0.5, 0.5, 0.5, 0.5\n"
    for text, message in (
        (rows, r'results\.txt: 0 lines "DPG-Bench score: \.\.\." after 2 items.*run it again'),
        (rows + "DPG-Bench score: 62.5\n" * 2, "2 lines"),
        (rows + "DPG-Bench score: nan\n", r"txt:3: 'DPG-Bench score: nan' is neither"),
        (
            rows + "DPG-Bench score: 75.0\n",
            r"2 items have the mean 62\.5000, its summary says " r"75\.0",
        ),
        (rows + "DPG-Bench score: 62.500002\n", "are missing or of another run"),
        (
            rows.removesuffix(", 0.5, 0.5\n") + "\nDPG-Bench score: 62.5\n",
            r"txt:2: scores of 2 crops, not " r"4",
        ),
        (rows.removesuffix(", 0.5\n") + "\nDPG-Bench score: 62.5\n", r"txt:2: scores of 3 crops"),
        (
            rows.removesuffix("0.5, 0.5\n") + "0.\nDPG-Bench score: 62.5\n",
            r"txt:2: .*neither an " r"image",
        ),
        (rows.removesuffix("0.5\n") + "1e-\nDPG-Bench score: 62.5\n", r"txt:2: .*neither an image"),
        (rows.removesuffix("0.5\n") + "0.0\nDPG-Bench score: 62.5\n", r"txt:2: .*is not the mean"),
        ("i/a.png, 1.0, 1.0\nDPG-Bench score: 100.0\n", r"txt:1: scores of 1 crops.*--pic-num 4"),
        (rows + rows + "DPG-Bench score: 62.5\n", r"txt:3: item a was there before"),
    ):
        path.write_text(text)
        with pytest.raises(InputError, match=message):
            dpg_bench.read_item_scores(path)
    for total in ("62.5", "62.50", "62.49999999999999", "62"):
        path.write_text(f"{rows}Model: x\nImage path: i.x, 1, 2\nDPG-Bench score: {total}\n")
        assert dpg_bench.read_item_scores(path) == {"a": 0.75, "b": 0.5}


def write_results(path: Path, scores: dict[str, list[float]]) -> Path:
    """The results file of a run that ended."""
    means = {item: sum(crops) / 4 for item, crops in scores.items()}
    rows = [
        f"i/{item}.png, {', '.join(map(str, crops))}, {means[item]}"
        for item, crops in scores.items()
    ]
    path.write_text(
        "\n".join([*rows, "Model: i", f"DPG-Bench score: {100 * sum(means.values()) / len(means)}"])
        + "\n"
    )
    return path


def test_dpg_results_with_the_graph(tmp_path: Path) -> None:
    csv = tmp_path / "g.csv"
    csv.write_text(CSV)
    sun = [{"Is there a sun?": "yes"}] * 4
    results = write_results(tmp_path / "r.txt", {"plain": [1.0] * 4})
    details(
        tmp_path / "r_detail.txt",
        {"first1": [{"Is the cat red, or reddish?": "yes"}], "plain": sun},
    )
    scores = parse_results("dpg-bench", results, csv)
    assert (scores.metrics["overall"], scores.metrics["repaired/overall"]) == (100.0, 100.0)
    assert "the official script fails on first1" in scores.notes
    assert "1 of the graph's 3 items have no result: whoops7" in scores.notes
    assert "INCOMPLETE: 2 scored, 1065 in the benchmark" in scores.notes
    claim_folder(tmp_path / "drawn", {}, 2)
    assert not any(
        "INCOMPLETE" in note
        for note in parse_results("dpg-bench", results, csv, tmp_path / "drawn").notes
    )
    (alone,) = [
        note
        for note in parse_results("dpg-bench", results, None, tmp_path / "drawn").notes
        if "INCOM" in note
    ]
    assert alone.startswith("INCOMPLETE: 1 scored, 2 drawn in")
    cloudy = {"plain": [*sun[:3], {"Is there a sun?": "no"}]}
    for answers in (cloudy, {"plain": sun, "whoops7": whoops("yyyy", "yyyy", "yyyy", "yyyy")}):
        details(tmp_path / "r_detail.txt", answers)
        with pytest.raises(InputError, match="not of one run"):
            parse_results("dpg-bench", results, csv)
    results = write_results(tmp_path / "r.txt", {"plain": [1.0] * 4, "whoops7": [1.0] * 4})
    details(tmp_path / "r_detail.txt", {"plain": sun})
    with pytest.raises(
        InputError,
        match=r"r\.txt: item whoops7: score 1\.0, from the detail file's answers " r"none",
    ):
        parse_results("dpg-bench", results, csv)


def test_dpg_scorer_without_the_skipped_row_is_read_too(tmp_path: Path) -> None:
    csv = tmp_path / "g.csv"
    csv.write_text(CSV)
    cat = [{"Is there a cat?": "yes", "Is the cat red, or reddish?": "yes"}] * 4
    results = write_results(tmp_path / "r.txt", {"first1": [1.0] * 4, "plain": [0.0] * 4})
    details(tmp_path / "r_detail.txt", {"first1": cat, "plain": [{"Is there a sun?": "no"}] * 4})
    scores = parse_results("dpg-bench", results, csv)
    assert (scores.metrics["overall"], scores.metrics["repaired/overall"]) == (0.0, 50.0)
    assert "the results file says 50.00, its answers give 0.00" in scores.notes


def test_dpg_graph_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "g.csv"
    for text, message in (
        ("item_id,text\n", "no column proposition_id"),
        (
            CSV.replace("whoops7,t,k,2,1,", "whoops7,t,k,2,one,"),
            r"g\.csv:5: proposition_id and " r"dependency",
        ),
        # the end of a download that was cut
        (CSV + "b,t,k,1,0\n", r"g\.csv:9: fewer fields than columns; fetch"),
        (CSV + "b\n", r"g\.csv:9: fewer fields"),
        (
            CSV + "b,t,k,1,0,entity,whole,entity - whole (x),Is it, then?\n",
            r"g\.csv:9: more " r"fields",
        ),
        (CSV.replace("whoops7,t,k,2,1,", "whoops7,t,k,2,9,"), r"item whoops7.*\[9\]"),
        (CSV.splitlines()[0] + "\n", "no questions"),
    ):
        path.write_text(text)
        with pytest.raises(InputError, match=message):
            dpg_bench.read_graph(path)
