"""Held-out pictures: read as for training, wrong captions of their own kind, a preference that can be known."""

from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import encoded, picture, sample, write_tar
from torch import Tensor

from lidit.errors import InputError
from lidit.evals.held_out import HeldOutPicture, caption_preference, read_pictures, wrong_captions
from lidit.images import Bucket, fit


def test_pictures_are_read_in_order_and_fitted(tmp_path: Path) -> None:
    first = [m for i in range(3) for m in sample(f"a{i}", f"picture {i}", {"style": "x" if i else "y"}, seed=i)]
    write_tar(tmp_path / "0.tar", first)
    write_tar(tmp_path / "1.tar", [m for i in range(3) for m in sample(f"b{i}", f"other {i}", {}, seed=9 + i)])
    found = read_pictures([str(tmp_path)], 16, 24, 4, "style")
    assert [(p.key, p.caption, p.group) for p in found] == [
        ("a0", "picture 0", "y"), ("a1", "picture 1", "x"), ("a2", "picture 2", "x"), ("b0", "other 0", "")
    ]  # fmt: skip
    expected, _ = fit(picture(seed=2), Bucket(16, 24))
    assert np.array_equal(found[2].image, np.asarray(expected))
    write_tar(tmp_path / "2.tar", [("c.png", encoded(picture())[:60]), ("c.txt", b"broken")])
    with pytest.raises(InputError, match=r"2\.tar: c: broken image"):
        read_pictures([str(tmp_path)], 16, 16, 100)
    write_tar(tmp_path / "2.tar", sample("d", caption=None))
    with pytest.raises(InputError, match="without image or caption"):
        read_pictures([str(tmp_path)], 16, 16, 100)


def held(*rows: tuple[str, str]) -> list[HeldOutPicture]:
    blank = np.zeros((2, 2, 3), np.uint8)
    return [HeldOutPicture(str(i), caption, blank, group) for i, (caption, group) in enumerate(rows)]


def test_wrong_captions_are_others_of_the_same_kind() -> None:
    pictures = held(("a", "x"), ("b", "y"), ("a", "x"), ("c", "x"), ("d", "y"))
    assert wrong_captions(pictures) == ["c", "d", "c", "a", "b"]
    with pytest.raises(InputError, match="no other caption of its kind"):
        wrong_captions(held(("a", "x"), ("b", "y")))


def test_preference_of_a_model_that_knows_some_captions() -> None:
    captions, latents = [str(i) for i in range(40)], torch.arange(40.0).view(40, 1, 1, 1)

    def knowing(known: int) -> float:
        def loss(x: Tensor, told: list[str], t: Tensor, noise: Tensor) -> Tensor:
            right = torch.tensor([float(text) == value for text, value in zip(told, x.flatten().tolist())])
            return 1 - (right & (x.flatten() < known)).float()

        wrong = [*captions[1:], captions[0]]
        return caption_preference(loss, latents, captions, wrong).value

    assert knowing(40) == 1.0
    assert knowing(0) == 0.5  # no difference counts half
    assert knowing(20) == 0.75
