"""Does an image show what its prompt says: GenEval's rule (lax), and the same with nothing else
shown (strict).

The lax rule follows evaluate_images.py of djghosh13/geneval clause by clause; classes are shape
names, a detection's confidence is its IoU. Extra objects are not punished there, so an image with
everything everywhere does well: strict also counts the objects and limits clutter.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lidit.datasets.scenes.shapes import Vocabulary, vocabulary_for
from lidit.errors import InputError
from lidit.evals.scenes.detection import Analysis, Found, analyse

# raise when the same image begins to score otherwise: scores of two versions are not compared
SCORER_VERSION = 1
POSITION_THRESHOLD = 0.1
CLUTTER_SHARE = 0.25
Item = Mapping[str, Any]
Box = Sequence[float]


@dataclass(frozen=True)
class SceneScore:
    """`reason` says what is wrong under the strict rule; `clauses`: per include clause, whether an
    object meets it.
    """

    lax: bool
    strict: bool
    reason: str
    clauses: tuple[bool, ...]
    analysis: Analysis

    def details(self) -> dict[str, list[list[float]]]:
        """GenEval's details: class -> detections, each (left, top, right, bottom, confidence)."""
        found: dict[str, list[list[float]]] = {}
        for item in self.analysis.objects:
            found.setdefault(item.shape, []).append([*map(float, item.box), item.iou])
        return found


def relative_position(box: Box, other: Box) -> set[str]:
    """GenEval's relations of `box` to `other`, both (left, top, right, bottom); a diagonal may
    satisfy two.

    Per axis, the offset of the centres less a tenth of the summed extents, over the distance of the
    centres, must exceed one half.
    """
    offsets, shrunk = [], []
    for low, high in ((0, 2), (1, 3)):
        offset = (box[low] + box[high] - other[low] - other[high]) / 2
        slack = POSITION_THRESHOLD * (box[high] - box[low] + other[high] - other[low])
        offsets.append(offset)
        shrunk.append(math.copysign(max(abs(offset) - slack, 0.0), offset))
    distance = math.hypot(*offsets)
    if distance == 0:
        return set()
    x, y = shrunk[0] / distance, shrunk[1] / distance
    named = {"left of": x < -0.5, "right of": x > 0.5, "above": y < -0.5, "below": y > 0.5}
    return {relation for relation, true in named.items() if true}


def score_image(
    image: NDArray[np.uint8], item: Item, vocabulary: Vocabulary | None = None
) -> SceneScore:
    """Scores a uint8 image [S, S, 3] against a prompt's record in GenEval's schema.

    `vocabulary` defaults to the one of the image's side and the item's `layout` ("free" where it
    names none). Raises InputError for an image or a record that cannot be scored.
    """
    if vocabulary is None:
        vocabulary = vocabulary_for(len(image), item.get("layout", "free"))
    return judge(analyse(image, vocabulary), item)


def judge(analysis: Analysis, item: Item) -> SceneScore:
    """The two rules on what was found. Raises InputError where the record is not in GenEval's
    schema.
    """
    try:
        include, exclude = item["include"], item.get("exclude", [])
        wanted = sum(clause["count"] for clause in include)
        problems = _lax_problems(analysis.objects, include, exclude)
        clauses = tuple(_clause_met(clause, analysis.objects) for clause in include)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise InputError(
            f"prompt record {dict(item)!r}: not in GenEval's schema ({error!r})"
        ) from None
    extra = []
    if len(analysis.objects) != wanted:
        extra.append(f"expected {wanted} objects in all, found {len(analysis.objects)}")
    if analysis.clutter > CLUTTER_SHARE * analysis.valid_area:
        extra.append(
            f"{analysis.clutter:.0f} px of clutter beside {analysis.valid_area:.0f} px of objects"
        )
    return SceneScore(
        not problems, not (problems or extra), "; ".join(problems + extra), clauses, analysis
    )


def _lax_problems(objects: Sequence[Found], include: list[dict], exclude: list[dict]) -> list[str]:
    problems: list[str] = []
    matched: list[list[Found] | None] = []
    names = [clause["class"] for clause in include]
    for clause in include:
        name, count = clause["class"], clause["count"]
        candidates = [item for item in objects if item.shape == name]
        if names.count(name) > 1:
            # lists name a class twice in two colours, which GenEval never does: there the colour
            # chooses the objects
            candidates = [
                item for item in candidates if item.colour == clause.get("color", item.colour)
            ]
        found = candidates[:count]
        met = True
        if len(found) < count:
            problems.append(f"expected {name}>={count}, found {len(found)}")
            met = False
        else:
            for key, values in (
                ("color", [f.colour for f in found]),
                ("size", [f.size for f in found]),
            ):
                if key in clause and values.count(clause[key]) < count:
                    problems.append(
                        f"expected {clause[key]} {name}>={count}, found {', '.join(values)}"
                    )
                    met = False
            if met and "position" in clause:
                relation, target = clause["position"]
                reference = matched[target]
                if reference is None:
                    problems.append(f"no target for {name} to be {relation}")
                    met = False
                elif not all(
                    relation in relative_position(f.box, t.box) for f in found for t in reference
                ):
                    problems.append(f"expected {name} {relation} target")
                    met = False
        matched.append(found if met else None)
    for clause in exclude:
        count = sum(item.shape == clause["class"] for item in objects)
        if count >= clause["count"]:
            problems.append(f"expected {clause['class']}<{clause['count']}, found {count}")
    return problems


def _clause_met(clause: dict, objects: Sequence[Found]) -> bool:
    """Whether enough objects have the clause's class, colour and size; positions are left out."""
    fitting = [
        item
        for item in objects
        if item.shape == clause["class"]
        and item.colour == clause.get("color", item.colour)
        and item.size == clause.get("size", item.size)
    ]
    return len(fitting) >= clause["count"]
