"""Held-out pictures: read as for training, wrong captions of their own kind, a preference that can
be known.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from lidit.errors import InputError
from lidit.evals.preference import HeldOutPicture, caption_preference, read_pictures, wrong_captions
from lidit.images import Bucket, fit
from tests.helpers.pictures import encoded, picture, sample, write_tar


def test_pictures_are_read_in_order_and_fitted(tmp_path: Path) -> None:
    first = [
        m
        for i in range(3)
        for m in sample(f"a{i}", f"picture {i}", {"style": "x" if i else "y"}, seed=i)
    ]
    write_tar(tmp_path / "0.tar", first)
    write_tar(
        tmp_path / "1.tar",
        [m for i in range(3) for m in sample(f"b{i}", f"other {i}", {}, seed=9 + i)],
    )
    found = read_pictures([str(tmp_path)], 16, 24, 4)
    assert [(p.key, p.caption, p.group) for p in found] == [
        ("a0", "picture 0", "y"), ("a1", "picture 1", "x"), ("a2", "picture 2", "x"), ("b0",
                                                                                       "other 0",
                                                                                       "")
    ]  # fmt: skip
    # nothing says that two of them are alike
    assert [p.motif for p in found] == ["a0", "a1", "a2", "b0"]
    expected, _ = fit(picture(seed=2), Bucket(16, 24))
    assert np.array_equal(found[2].image, np.asarray(expected))
    write_tar(tmp_path / "2.tar", sample("c", "picture", {"motif": "harp"}))
    assert [p.motif for p in read_pictures([str(tmp_path)], 16, 24, 100)][-1] == "harp"
    write_tar(tmp_path / "2.tar", [("c.png", encoded(picture())[:60]), ("c.txt", b"broken")])
    with pytest.raises(InputError, match=r"2\.tar: c: broken image"):
        read_pictures([str(tmp_path)], 16, 16, 100)
    write_tar(tmp_path / "2.tar", sample("d", caption=None))
    with pytest.raises(InputError, match="without image or caption"):
        read_pictures([str(tmp_path)], 16, 16, 100)


def held(*rows: tuple[str, str]) -> list[HeldOutPicture]:
    blank = np.zeros((2, 2, 3), np.uint8)
    return [
        HeldOutPicture(str(i), caption, blank, group, str(i))
        for i, (caption, group) in enumerate(rows)
    ]


def test_wrong_captions_are_others_of_the_same_kind() -> None:
    pictures = held(("a", "x"), ("b", "y"), ("a", "x"), ("c", "x"), ("d", "y"))
    assert wrong_captions(pictures) == ["c", "d", "c", "a", "b"]
    with pytest.raises(InputError, match="no other caption of its kind"):
        wrong_captions(held(("a", "x"), ("b", "y")))


def test_preference_of_a_model_that_knows_some_captions() -> None:
    captions, latents = [str(i) for i in range(40)], torch.arange(40.0).view(40, 1, 1, 1)

    def knowing(known: int) -> float:
        def loss(x: Tensor, told: list[str], t: Tensor, noise: Tensor) -> Tensor:
            right = torch.tensor(
                [float(text) == value for text, value in zip(told, x.flatten().tolist())]
            )
            return 1 - (right & (x.flatten() < known)).float()

        wrong = [*captions[1:], captions[0]]
        return caption_preference(loss, latents, captions, wrong).value

    assert knowing(40) == 1.0
    assert knowing(0) == 0.5  # no difference counts half
    assert knowing(20) == 0.75


def test_near_copies_count_as_one_draw() -> None:
    captions, latents = [str(i % 2) for i in range(40)], torch.arange(40.0).view(40, 1, 1, 1)

    def loss(x: Tensor, told: list[str], t: Tensor, noise: Tensor) -> Tensor:
        wrong = (torch.tensor([float(text) for text in told]) - x.flatten() % 2).abs()
        # the first half prefer their own, the others do not
        return torch.where(x.flatten() < 20, wrong, 1 - wrong)

    wrong = [str(1 - int(caption)) for caption in captions]
    alone = caption_preference(loss, latents, captions, wrong)
    copies = caption_preference(loss, latents, captions, wrong, [str(i // 8) for i in range(40)])
    assert alone.value == copies.value
    assert copies.high - copies.low > alone.high - alone.low
