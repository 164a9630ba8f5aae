"""Small real models and states for the model's properties."""

from collections.abc import Callable

import pytest
import torch

from lidit.config import ModelSettings
from lidit.models import LIDiT, TextStates

WIDTHS = {"first": 20, "second": 12, "third": 28}
PREFIX = {"first": 3, "second": 5, "third": 0}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def make_model() -> Callable[..., LIDiT]:
    """A model of `count` encoders with random statistics; `awake` opens every gate that starts at
    zero.
    """

    def build(
        count: int = 2,
        awake: bool = True,
        dtype: torch.dtype = torch.float32,
        stored_layers: dict[str, int] | None = None,
        **settings: object,
    ) -> LIDiT:
        shape = {"width": 32, "depth": 2, "heads": 4, "patch_size": 2, **settings}
        names = list(WIDTHS)[:count]
        sizes = {name: WIDTHS[name] for name in names}
        model = LIDiT.from_settings(ModelSettings.model_validate(shape), sizes, 3, stored_layers)
        for name in names:
            model.conditioner.set_statistics(
                name, torch.randn(WIDTHS[name]), torch.rand(WIDTHS[name]) + 0.5
            )
        if awake:
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(0.2 * torch.randn_like(parameter))
        return model.to(dtype).eval()

    return build


@pytest.fixture
def make_text() -> Callable[..., dict[str, TextStates]]:
    """States for captions of the given lengths, other lengths for every encoder."""

    def build(
        lengths: tuple[int, ...] = (4, 1, 7), count: int = 2, dtype: torch.dtype = torch.float32
    ) -> dict[str, TextStates]:
        text = {}
        for offset, name in enumerate(list(WIDTHS)[:count]):
            captions = [
                3 * torch.randn(length + offset, WIDTHS[name], dtype=dtype) for length in lengths
            ]
            text[name] = TextStates.collate(
                captions, 3 * torch.randn(PREFIX[name], WIDTHS[name], dtype=dtype)
            )
        return text

    return build
