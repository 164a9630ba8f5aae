"""Scenes: reproducible bytes, true metadata, held-out pairs kept out, captions that say what the
image shows.
"""

import io
import json
import math
import re
import tarfile
from pathlib import Path
from random import Random

import numpy as np
import pytest
from PIL import Image

from lidit.datasets.scenes.benchmark import benchmark_prompts
from lidit.datasets.scenes.captions import (
    HELD_OUT_STYLES,
    STYLES,
    CaptionStyles,
    style_fits,
    write_caption,
)
from lidit.datasets.scenes.generator import generate_scene
from lidit.datasets.scenes.layouts import OPPOSITE, RELATIONS
from lidit.datasets.scenes.phrases import COUNTS, ORDINALS, core, references
from lidit.datasets.scenes.scene import FREE_TAGS, SIMPLE_TAGS, Scene, SceneObject, names_colours
from lidit.datasets.scenes.shapes import COLOURS, SHAPES, coverage, vocabulary_for
from lidit.datasets.scenes.shards import SceneSet, write_scene_shards
from lidit.errors import InputError


def samples(path: Path) -> dict[str, dict[str, bytes]]:
    """key -> extension -> content of a WebDataset tar."""
    found: dict[str, dict[str, bytes]] = {}
    with tarfile.open(path) as tar:
        for member in tar:
            key, extension = member.name.split(".")
            found.setdefault(key, {})[extension] = tar.extractfile(member).read()
    return found


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("layout", ["simple", "free"])
def test_same_arguments_same_bytes(tmp_path: Path, layout: str) -> None:
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        write_scene_shards(
            tmp_path / name, SceneSet(count=23, size=32, seed=seed, layout=layout, per_shard=10)
        )
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    first, other = contents(tmp_path / "a"), contents(tmp_path / "c")
    assert list(first) == [
        "scenes-00000.tar",
        "scenes-00001.tar",
        "scenes-00002.tar",
        "scenes.json",
    ]
    assert all(first[name] != other[name] for name in first)


def test_samples_are_complete_and_true(tmp_path: Path) -> None:
    summary = write_scene_shards(
        tmp_path / "s", SceneSet(count=40, size=48, seed=0, layout="free", per_shard=25)
    )
    assert (summary.scenes, summary.captions, summary.skipped) == (40, 80, False)
    merged = {key: sample for shard in summary.shards for key, sample in samples(shard).items()}
    assert sorted(merged) == [f"{index:08d}" for index in range(40)]
    texts = set()
    for sample in merged.values():
        assert set(sample) == {"png", "txt", "json"}
        record = json.loads(sample["json"])
        assert [caption["origin"] for caption in record["captions"]] == ["original", "synthetic"]
        assert (
            record["captions"][0]["text"] == sample["txt"].decode() == record["geneval"]["prompt"]
        )
        assert record["split"] == "train"
        texts |= {caption["text"] for caption in record["captions"]}
        scene = Scene(record["tag"], 48, tuple(SceneObject(**item) for item in record["objects"]))
        with Image.open(io.BytesIO(sample["png"])) as image:
            assert (image.size, image.mode) == ((48, 48), "RGB")
            assert np.array_equal(np.asarray(image), scene.render())
    assert summary.distinct_captions == len(texts)
    with tarfile.open(summary.shards[0]) as tar:
        assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in tar} == {
            (0, 0, 0, "", "", 0o644)
        }


def test_interrupted_set_is_continued_and_complete_set_is_kept(tmp_path: Path) -> None:
    arguments = {"count": 30, "size": 32, "seed": 1, "per_shard": 10}
    whole = write_scene_shards(tmp_path / "whole", SceneSet(**arguments))
    broken = tmp_path / "broken"
    write_scene_shards(broken, SceneSet(**arguments))
    record = json.loads((broken / "scenes.json").read_text())
    (broken / "scenes.json").write_text(json.dumps({"plan": record["plan"], "complete": False}))
    (broken / "scenes-00001.tar").unlink()
    (broken / "scenes-00001.partial").write_bytes(b"half")
    kept = (broken / "scenes-00000.tar").stat().st_mtime_ns
    resumed = write_scene_shards(broken, SceneSet(**arguments))
    assert contents(broken) == contents(tmp_path / "whole")
    assert (broken / "scenes-00000.tar").stat().st_mtime_ns == kept
    assert (resumed.captions, resumed.distinct_captions) == (
        whole.captions,
        whole.distinct_captions,
    )
    again = write_scene_shards(broken, SceneSet(**arguments))
    assert again.skipped
    assert again.distinct_captions == whole.distinct_captions
    (broken / "scenes-00002.tar").write_bytes(b"changed")
    with pytest.raises(InputError, match=r"scenes-00002\.tar: missing or changed"):
        write_scene_shards(broken, SceneSet(**arguments))


def test_other_folders_are_refused(tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.tex").write_text("x")
    with pytest.raises(InputError, match="not a scene set of ours"):
        write_scene_shards(tmp_path / "precious", SceneSet(count=1, size=32, seed=0))
    write_scene_shards(tmp_path / "s", SceneSet(count=1, size=32, seed=0))
    with pytest.raises(InputError, match="other count, seed"):
        write_scene_shards(tmp_path / "s", SceneSet(count=2, size=32, seed=1))
    with pytest.raises(InputError, match="is a file"):
        write_scene_shards(tmp_path / "precious" / "thesis.tex", SceneSet(count=1, size=32, seed=0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"count": 0}, "count=0: must be at least 1"),
        ({"size": 8}, "size=8: must be at least 16"),
        ({"size": 16, "layout": "free"}, "size=16: must be at least 32"),
        ({"layout": "dense"}, "choose 'simple' or 'free'"),
        ({"categories": {"counting": 1.0}}, "needs layout='free'"),
        ({"categories": {"colour": 1.0}}, "'colour' is unknown"),
        ({"categories": {"colors": -1.0}}, "none may be negative"),
        ({"split": "test"}, "choose 'train' or 'unseen'"),
        ({"styles": CaptionStyles((), ())}, "no caption styles"),
        ({"styles": CaptionStyles(("haiku",), ())}, "'haiku' is unknown"),
    ],
)
def test_wrong_arguments_are_named(tmp_path: Path, change: dict, message: str) -> None:
    arguments = {"count": 4, "size": 32, "seed": 0, "layout": "simple"} | change
    with pytest.raises(InputError, match=re.escape(message)):
        write_scene_shards(tmp_path / "s", SceneSet(**arguments))


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_have_unit_area_and_centroid_at_the_origin(name: str) -> None:
    fine = coverage(name, 200.13, 200.37, 120.0**2, (0, 0, 400, 400))
    centres = np.arange(400) + 0.5
    assert fine.sum() / 120**2 == pytest.approx(1, abs=0.002)
    assert (
        fine.sum(0) @ centres / fine.sum(),
        fine.sum(1) @ centres / fine.sum(),
    ) == pytest.approx((200.13, 200.37), abs=0.13)
    rows, columns = np.nonzero(fine > 0.01)
    farthest = np.hypot(rows + 0.5 - 200.37, columns + 0.5 - 200.13).max()
    assert farthest / 120 <= SHAPES[name].reach + 0.01


@pytest.mark.parametrize("size", [32, 48, 64])
@pytest.mark.parametrize("tag", FREE_TAGS)
def test_free_scenes_keep_objects_apart_and_inside(tag: str, size: int) -> None:
    vocabulary = vocabulary_for(size)
    for seed in range(15):
        scene = generate_scene(Random(seed), tag, size, "free", vocabulary)
        whole = np.zeros((size, size))
        for item in scene.objects:
            alpha = coverage(item.shape, item.x, item.y, item.area, (0, 0, size, size))
            # the grid of samples, not a cut
            assert alpha.sum() == pytest.approx(item.area, rel=0.12)
            assert np.all(whole[alpha > 0] == 0)
            whole += alpha


@pytest.mark.parametrize("layout", ["simple", "free"])
@pytest.mark.parametrize("relation", RELATIONS)
def test_relations_hold_beyond_doubt(layout: str, relation: str) -> None:
    found = 0
    for seed in range(60):
        scene = generate_scene(Random(seed), "position", 32, layout, vocabulary_for(32, layout))
        first, second = scene.objects
        dx, dy = first.x - second.x, first.y - second.y
        across = dy if relation in ("left of", "right of") else dx
        along = {"left of": -dx, "right of": dx, "above": -dy, "below": dy}[relation]
        if scene.relation == relation:
            found += 1
            assert along > 0
            assert abs(across) <= 0.25 * math.hypot(dx, dy) + 1e-9
        elif scene.relation == OPPOSITE[relation]:
            assert along < 0
    assert found >= 5


@pytest.mark.parametrize("layout", ["simple", "free"])
def test_training_never_shows_held_out_pairs_and_unseen_always_does(layout: str) -> None:
    vocabulary = vocabulary_for(32, layout)
    held_out = vocabulary.held_out_pairs()
    assert {shape for _, shape in held_out} == set(vocabulary.shapes)
    for tag in SIMPLE_TAGS if layout == "simple" else FREE_TAGS:
        for seed in range(20):
            assert not generate_scene(Random(seed), tag, 32, layout, vocabulary, "train").shows(
                held_out
            )
            assert generate_scene(Random(seed), tag, 32, layout, vocabulary, "unseen").shows(
                held_out
            )


def read_back(text: str, tag: str) -> dict:
    """Metadata from a bare caption: the inverse of the writer, so a wrong word anywhere shows."""
    relation = next((word for word in RELATIONS if f" {word} " in text), None)
    clauses = []
    for phrase in re.split(f" {relation} " if relation else r", | and ", text):
        first, *adjectives, shape = phrase.split()
        if first in COUNTS:
            count = COUNTS.index(first)
            name = next(
                shape[: len(shape) - cut]
                for cut in (0, 1, 2)
                if shape[: len(shape) - cut] in SHAPES
            )
            return {
                "tag": tag,
                "include": [{"class": name, "count": count}],
                "exclude": [{"class": name, "count": count + 1}],
            }
        assert first == ("an" if (adjectives or [shape])[0][0] in "aeiou" else "a")
        clause = {"class": shape, "count": 1}
        for word in adjectives:
            clause["color" if word in COLOURS else "size"] = word
        clauses.append(clause)
    if relation:
        clauses.reverse()
        clauses[1]["position"] = [relation, 0]
    return {"tag": tag, "include": clauses}


@pytest.mark.parametrize("tag", FREE_TAGS)
def test_caption_round_trip(tag: str) -> None:
    for seed in range(20):
        scene = generate_scene(Random(seed), tag, 64, "free", vocabulary_for(64))
        text = write_caption(scene, "bare", Random(0))
        assert read_back(text, tag) | {"prompt": text} == scene.geneval(text)


@pytest.mark.parametrize("tag", FREE_TAGS)
def test_every_style_names_every_object_with_its_attributes(tag: str) -> None:
    scene = generate_scene(Random(5), tag, 32, "free", vocabulary_for(32))
    for style in STYLES:
        if not style_fits(style, scene):
            continue
        text = write_caption(scene, style, Random(0)).lower()
        for item in scene.objects:
            assert item.shape in text
            assert (item.colour in text) >= names_colours(tag)
            assert (tag != "size_attr") or item.size in text
        if scene.relation:
            assert scene.relation in text


@pytest.mark.parametrize(
    "tag", ["color_attr", "color_attr_position", "size_attr", "list4", "list6", "list8"]
)
def test_late_styles_say_the_same_after_the_nouns(tag: str) -> None:
    for seed in range(10):
        scene = generate_scene(Random(seed), tag, 64, "free", vocabulary_for(64))
        said = [item.size if tag == "size_attr" else item.colour for item in scene.objects]
        names = references(scene)
        text = write_caption(scene, "clauses", Random(seed))
        nouns, _, clauses = text.partition("; ")
        assert not any(word in nouns for word in said)
        assert sorted(clauses.split(", ")) == sorted(
            f"{name} is {word}" for name, word in zip(names, said)
        )
        text = write_caption(scene, "ordinals", Random(seed))
        assert re.findall(r"the (\w+) is (\w+)", text) == list(zip(ORDINALS, said))
        text = write_caption(scene, "long", Random(seed))
        sentences = [sentence.lower() for sentence in text.split(". ")]
        assert not any(word in sentences[1].split() for word in said)
        for name, word in zip(names, said):
            assert any(
                sentence.startswith(name) and sentence.endswith(f" {word}")
                for sentence in sentences
            )
        assert len(sentences) == 3 + 2 * len(names)
        first, *looks = (
            write_caption(scene, "sentences", Random(seed)).lower().rstrip(".").split(". ")
        )
        assert first == sentences[1]
        assert sorted((look.split()[-1], look.startswith("the ")) for look in looks) == sorted(
            (w, True) for w in said
        )
        assert all(
            any(look.startswith(name) and look.endswith(f" {w}") for look in looks)
            for name, w in zip(names, said)
        )
        before = write_caption(scene, "long_before", Random(seed))
        assert core(scene) in before
        if tag.startswith("list"):
            assert 40 < len(before.split()) < len(text.split()) < 180


def test_places_in_prose_are_true() -> None:
    scene = Scene(
        "color_attr",
        30,
        (SceneObject("circle", "red", 5, 5, 40), SceneObject("cross", "blue", 15, 25, 40)),
    )
    text = write_caption(scene, "long", Random(0))
    assert re.search(r"The circle [a-z ]+ the upper left corner\.", text)
    assert re.search(r"The cross [a-z ]+ the bottom\.", text)


def test_late_styles_are_refused_where_nothing_is_said() -> None:
    scene = generate_scene(Random(0), "two_object", 32, "free", vocabulary_for(32))
    with pytest.raises(InputError, match="cannot describe a two_object scene"):
        write_caption(scene, "clauses", Random(0))


def test_simple_captions_are_short(tmp_path: Path) -> None:
    summary = write_scene_shards(tmp_path / "s", SceneSet(count=200, size=32, seed=0))
    texts = {
        c["text"]
        for sample in samples(summary.shards[0]).values()
        for c in json.loads(sample["json"])["captions"]
    }
    assert max(len(text.split()) for text in texts) <= 10


def test_style_that_cannot_describe_the_category_is_refused() -> None:
    scene = generate_scene(Random(0), "colors", 32, "simple", vocabulary_for(32, "simple"))
    with pytest.raises(InputError, match="cannot describe a colors scene"):
        write_caption(scene, "relation_first", Random(0))


@pytest.mark.parametrize("layout", ["simple", "free"])
def test_benchmark_prompts(layout: str) -> None:
    items = benchmark_prompts(32, layout, seed=0, per_tag=12)
    assert items == benchmark_prompts(32, layout, seed=0, per_tag=12)
    assert items != benchmark_prompts(32, layout, seed=1, per_tag=12)
    assert {item["tag"] for item in items} == set(SIMPLE_TAGS if layout == "simple" else FREE_TAGS)
    held_out = vocabulary_for(32, layout).held_out_pairs()
    for tag in {item["tag"] for item in items}:
        chosen = [item for item in items if item["tag"] == tag]
        assert len({item["prompt"] for item in chosen}) == len(chosen) <= 12
        if tag not in ("single_object", "counting"):  # these two run out of distinct prompts
            assert len(chosen) == 12
    for item in items:
        named = {(clause.get("color"), clause["class"]) for clause in item["include"]}
        assert bool(named & held_out) == (item["held_out"] == "pair")
        unusual = item["prompt"].startswith("there ") or any(
            item["prompt"].startswith(word) for word in RELATIONS
        )
        assert unusual == (item["held_out"] == "template")
        assert item["unseen"] == (item["held_out"] != "none")
    assert set(HELD_OUT_STYLES) < set(STYLES)


def test_benchmark_prompts_refuse_wrong_arguments() -> None:
    with pytest.raises(InputError, match="per_tag=0"):
        benchmark_prompts(32, "simple", 0, 0)
    with pytest.raises(InputError, match="needs layout='free'"):
        benchmark_prompts(32, "simple", 0, 1, tags=("counting",))
