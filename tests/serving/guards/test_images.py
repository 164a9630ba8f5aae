"""Images are scored by a rule on pixels and by a classifier in a file; what cannot be scored passes
nobody.
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import numpy as np
import pytest

from lidit.errors import InputError
from lidit.serving.guards.guard import Guard, SafetyUnavailable
from lidit.serving.guards.images import Image, OnnxClassifier, OnnxSettings, PixelRule
from tests.helpers.tiny_onnx import tiny_classifier

RED, GREY = (220, 20, 20), (128, 128, 128)


def picture(*parts: tuple[tuple[int, int, int], int]) -> Image:
    """An image of 8 x 8 pixels with so many rows of each colour."""
    return np.concatenate([np.full((rows, 8, 3), colour, np.uint8) for colour, rows in parts])


def test_a_rule_counts_pixels_near_its_colour() -> None:
    rule = PixelRule(RED, share=0.5)
    images = [
        picture((GREY, 8)),
        picture((RED, 2), (GREY, 6)),
        picture((RED, 4), (GREY, 4)),
        picture((RED, 8)),
    ]
    assert rule.scores(images) == [0, 0.5, 1, 1]
    assert rule.scores([picture(((200, 50, 40), 8))]) == [1]
    assert PixelRule(RED, 0.25).version != rule.version
    with pytest.raises(InputError):
        PixelRule(RED, share=0)


@pytest.mark.parametrize(
    "wrong",
    [np.zeros((8, 8, 3), np.float32), np.zeros((8, 8), np.uint8), np.zeros((8, 8, 4), np.uint8),
     np.zeros((0, 8, 3), np.uint8), None],
)  # fmt: skip
def test_what_is_no_image_closes_the_guard(wrong: Image, tmp_path: Path) -> None:
    for checker in (PixelRule(RED, 0.5), classifier(tmp_path)):
        with pytest.raises(SafetyUnavailable):
            Guard[Image]("images", checker, 0.5).judge([picture((GREY, 8)), wrong])


def settings(folder: Path, *operations: str, **changes: object) -> OnnxSettings:
    content = tiny_classifier(*operations)
    (folder / "tiny.onnx").write_bytes(content)
    values = {"file": folder / "tiny.onnx", "sha256": hashlib.sha256(content).hexdigest(),
              "height": 4, "width": 6,
              "unsafe": 0, "activation": "none", **changes}  # fmt: skip
    return OnnxSettings.model_validate(values)


def classifier(folder: Path, *operations: str, **changes: object) -> OnnxClassifier:
    pytest.importorskip("onnxruntime")
    return OnnxClassifier(settings(folder, *operations, **changes))


def test_a_classifier_gets_its_input_as_it_wants_it(tmp_path: Path) -> None:
    image = picture(((255, 51, 0), 8))
    # The classifier's output is the mean of each channel.
    assert classifier(tmp_path).scores([image]) == pytest.approx([1])
    assert classifier(tmp_path, unsafe=1).scores([image]) == pytest.approx([0.2])
    assert classifier(tmp_path, channels="BGR").scores([image]) == [0]
    moved = classifier(tmp_path, unsafe=1, mean=(0, 1, 0), std=(1, 100, 1))
    assert moved.scores([image, picture((GREY, 8))]) == pytest.approx([0.5, 1.27])
    probability = classifier(tmp_path, activation="softmax").scores([image])
    assert probability == pytest.approx([np.e / (np.e + np.exp(0.2) + 1)])
    assert classifier(tmp_path, activation="sigmoid").scores([image]) == pytest.approx(
        [1 / (1 + np.exp(-1))]
    )
    # NHWC: the means are over width and channels, one for each row of pixels.
    assert classifier(tmp_path, layout="NHWC", unsafe=2).scores([image]) == pytest.approx([0.4])


def test_answers_of_a_classifier_that_are_no_scores_close_the_guard(tmp_path: Path) -> None:
    for checker in (
        classifier(tmp_path, "Sqrt", mean=(255, 255, 255)),  # NaN
        classifier(tmp_path, std=(1, 1, 1)),  # above 1
        classifier(tmp_path, unsafe=7),  # no such output
        classifier(tmp_path, layout="NHWC", unsafe=5),
    ):
        with pytest.raises(SafetyUnavailable):
            Guard[Image]("onnx", checker, 0.5).judge([picture((GREY, 8))])
    guard = Guard[Image]("onnx", classifier(tmp_path), 0.6)
    assert [
        verdict.flagged for verdict in guard.judge([picture((GREY, 8)), picture((RED, 8))])
    ] == [False, True]


def test_a_classifier_that_is_not_the_right_file_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    good = settings(tmp_path)
    with pytest.raises(InputError, match="cannot be read"):
        OnnxClassifier(good.model_copy(update={"file": tmp_path / "absent.onnx"}))
    with pytest.raises(InputError, match="not the file with this sha256"):
        OnnxClassifier(good.model_copy(update={"sha256": "0" * 64}))
    (tmp_path / "noise.onnx").write_bytes(b"noise")
    noise = {"file": tmp_path / "noise.onnx", "sha256": hashlib.sha256(b"noise").hexdigest()}
    with pytest.raises(InputError, match="onnxruntime cannot load it"):
        OnnxClassifier(good.model_copy(update=noise))


def test_without_onnxruntime_there_is_no_guard_rather_than_an_open_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(InputError, match="pip install onnxruntime"):
        OnnxClassifier(settings(tmp_path))
