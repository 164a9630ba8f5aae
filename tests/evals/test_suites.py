"""Official suites: exact layouts, resuming, and aggregates of hand-made result files whose answers are known."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lidit.errors import InputError
from lidit.evals import dpg_bench, geneval, t2i_compbench
from lidit.evals.suites import ImageTarget, claim_folder, missing, save_target


def picture(value: int, side: int = 8) -> np.ndarray:
    return np.full((side, side, 3), value, np.uint8)


def files_under(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


# ---------------------------------------------------------------------------------------------------------------------
# Shared


def test_images_are_whole_or_absent_and_missing_ones_are_listed(tmp_path: Path) -> None:
    targets = [ImageTarget(Path(f"a/{number}.png"), f"prompt {number}", (42,)) for number in range(4)]
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


def test_a_folder_belongs_to_one_model_and_prompt_list(tmp_path: Path) -> None:
    claim_folder(tmp_path / "out", {"suite": "geneval", "model": "abc", "seed": 42})
    claim_folder(tmp_path / "out", {"seed": 42, "suite": "geneval", "model": "abc"})
    with pytest.raises(InputError, match="made with other model, seed"):
        claim_folder(tmp_path / "out", {"suite": "geneval", "model": "abd"})
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("x")
    with pytest.raises(InputError, match=r"without suite\.json"):
        claim_folder(tmp_path / "other", {"suite": "geneval"})


# ---------------------------------------------------------------------------------------------------------------------
# GenEval


def test_geneval_layout(tmp_path: Path) -> None:
    source = tmp_path / "prompts.jsonl"
    items = [
        {"tag": "colors", "include": [{"class": "car", "count": 1, "color": "red"}], "prompt": "a photo of a red car"},
        {"tag": "counting", "include": [{"class": "dog", "count": 2}], "prompt": "a photo of two dogs"},
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
            json.dumps({"tag": tag, "correct": correct, "metadata": json.dumps({"prompt": prompt}), "prompt": prompt})
            + "\n"
            for tag, prompt, correct in rows
        )
    )
    summary = geneval.read_results(path)
    assert {tag: interval.value for tag, interval in summary.tags.items()} == {"colors": 0.75, "position": 0.25}
    assert summary.overall == 0.5
    assert summary.correct_images == pytest.approx(7 / 12)
    assert summary.correct_prompts == pytest.approx(4 / 6)
    assert (summary.images, summary.prompts) == (12, 6)
    assert summary.metrics()["position"] == 0.25
    path.write_text('{"tag": "colors", "correct": "yes", "metadata": "{}"}\n')
    with pytest.raises(InputError, match="expected true or false"):
        geneval.read_results(path)


# ---------------------------------------------------------------------------------------------------------------------
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
        assert len({target.path for target in t2i_compbench.image_targets(category, prompts)}) == 3000


def write_answers(path: Path, answers: list, ids: list[int] | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    records = [{"question_id": number, "answer": answer} for number, answer in zip(ids or range(len(answers)), answers)]
    path.write_text(json.dumps(records))


def test_t2i_compbench_scores(tmp_path: Path) -> None:
    for category, answers in (
        ("color", ["0.5000"] * 10 + ["1.0000"] * 10),
        ("shape", [0.25] * 20),
        ("texture", [0.5] * 20),
    ):
        write_answers(tmp_path / category / "annotation_blip/vqa_result.json", answers)
    scores = {category: t2i_compbench.read_category(tmp_path, category) for category in ("color", "shape", "texture")}
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


def test_t2i_compbench_three_in_one(tmp_path: Path) -> None:
    folder = tmp_path / "complex"
    write_answers(folder / "annotation_blip/vqa_result.json", ["0.6"] * 30)
    write_answers(folder / "annotation_obj_detection/vqa_result.json", [0.2] * 30)
    write_answers(folder / "annotation_clip/vqa_result.json", [0.4] * 30)
    prompts = ["The hat is on the rack.", "The dog chases the cat.", "The cat is near a dog. It sleeps."]
    result = t2i_compbench.three_in_one(
        tmp_path, prompts, ["the hat is on the rack"], ["The dog CHASES the cat. Then both rest."]
    )
    # (.6 + .2) / 2, (.6 + .4) / 2, (.6 + .2 + .4) / 3
    assert result.score.value == pytest.approx((0.4 + 0.5 + 0.4) / 3)
    with pytest.raises(InputError, match="30 scores for 2 prompts, expected 20"):
        t2i_compbench.three_in_one(tmp_path, prompts[:2], [], [])


# ---------------------------------------------------------------------------------------------------------------------
# DPG-Bench

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
            lines += [f"some, folder/{item}.png, {box}, {question}, {answer}" for question, answer in crop.items()]
    path.write_text("\n".join(lines) + "\n")
    return path


DOG = ("Is there a dog?", "Is the dog blue?", "Is the blue dog on a mat?", "Is there a mat?")


def whoops(*patterns: str) -> list[dict[str, str]]:
    return [dict(zip(DOG, ("yes" if letter == "y" else "no" for letter in pattern))) for pattern in patterns]


def test_dpg_layout(tmp_path: Path) -> None:
    source = tmp_path / "prompts.jsonl"
    source.write_text('{"item_id": "0", "prompt": "A field."}\n{"item_id": "whoops7", "prompt": "A dog."}\n')
    prompts = dpg_bench.read_prompts(source)
    targets, out = dpg_bench.image_targets(prompts), tmp_path / "out"
    for target in targets:
        assert target.seeds == (42, 43, 44, 45)
        save_target(out, target, [picture(value) for value in (10, 20, 30, 40)])
    assert files_under(out) == ["images/0.png", "images/whoops7.png"]
    assert [path.name for path in (out / "images").iterdir() if path.suffix != ".png"] == []
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
    result = dpg_bench.score(dpg_bench.read_graph(path), {"c": [{1: False, 2: True, 3: True}]})
    assert result.items == {"c": 0.0}


def test_dpg_category_scores_with_and_without_the_official_quirk(graph: dpg_bench.Graph) -> None:
    answers = {"whoops7": [{1: True, 2: True, 3: True, 4: False}] * 3 + [{1: False, 2: True, 3: True, 4: False}]}
    official = dpg_bench.score(graph, answers)
    # only the last crop, before zeroing: dog no, mat no; blue yes; on a mat yes
    assert official.detailed == {"attribute - color": 100, "entity - whole": 0, "relation - spatial": 100}
    fair = dpg_bench.score(graph, answers, official_quirks=False)
    assert fair.detailed == {"attribute - color": 75, "entity - whole": 37.5, "relation - spatial": 75}
    assert fair.broad == {"attribute": 75, "entity": 37.5, "relation": 75}
    assert fair.overall == official.overall == pytest.approx(100 * (3 * 0.75 + 0) / 4)


def test_dpg_first_row_is_skipped_and_its_item_dropped_where_others_depend_on_it(graph: dpg_bench.Graph) -> None:
    answers = {"first1": [{1: True, 2: True}] * 4, "plain": [{1: False}] * 4}
    official = dpg_bench.score(graph, answers)
    assert (official.overall, official.dropped) == (0.0, ("first1",))
    fair = dpg_bench.score(graph, answers, official_quirks=False)
    assert (fair.overall, fair.dropped) == (50.0, ())
    # the official scorer never asked the first question: the rest of the item still counts
    unasked = dpg_bench.score(graph, {"first1": [{2: True}] * 4}, official_quirks=False)
    assert unasked.items == {"first1": 1.0}


def test_dpg_answers_with_commas_and_incomplete_files(graph: dpg_bench.Graph, tmp_path: Path) -> None:
    path = details(tmp_path / "d.txt", {"first1": [{"Is the cat red, or reddish?": "yes"}] * 4})
    assert dpg_bench.read_details(path, graph) == {"first1": [{2: True}] * 4}
    path = details(tmp_path / "d.txt", {"first1": [{"Is the cat red, or reddish?": "yes, it is"}]})
    assert dpg_bench.read_details(path, graph) == {"first1": [{2: False}]}  # only exactly "yes" counts
    path = details(tmp_path / "d.txt", {"whoops7": [dict(list(whoops("yyyy")[0].items())[:3])]})
    with pytest.raises(InputError, match="no answer to proposition 4"):
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
        "some, folder/whoops7.png, 0.25, 0.5, 0.75, 1.0, 0.625\nsome, folder/plain.png, 0.0, 0.0, 0.0, 0.0, 0.0\n"
        "Model: x\nL1 category scores:\n\tentity: 50.0\nImage path: some, folder\nDPG-Bench score: 31.25\n"
    )
    assert dpg_bench.read_item_scores(path) == {"whoops7": 0.625, "plain": 0.0}
    path.write_text("Model: x\n")
    with pytest.raises(InputError, match="--res-path"):
        dpg_bench.read_item_scores(path)


def test_dpg_graph_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "g.csv"
    for text, message in (
        ("item_id,text\n", "no column proposition_id"),
        (CSV.replace("whoops7,t,k,2,1,", "whoops7,t,k,2,one,"), "data row 4: proposition_id and dependency"),
        (CSV.replace("whoops7,t,k,2,1,", "whoops7,t,k,2,9,"), r"item whoops7.*\[9\]"),
        (CSV.splitlines()[0] + "\n", "no questions"),
    ):
        path.write_text(text)
        with pytest.raises(InputError, match=message):
            dpg_bench.read_graph(path)
