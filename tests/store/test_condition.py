"""Stored states in the layouts of public pipelines: names, order of axes, masks, padding."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lidit.errors import InputError
from lidit.store import SharedStates
from lidit.store.condition import arguments

LAYERS, WIDTH = 3, 4
PREFIX = torch.arange(2.0 * LAYERS * WIDTH).view(2, -1)
ROWS = [torch.randn(length, LAYERS * WIDTH) for length in (3, 1, 2)]


def family(spec: dict[str, Any] | None = None, **condition: Any) -> Any:
    layout = {
        "pipeline": "FluxPipeline", "states": "prompt_embeds", "mask": "mask", "pooled": None,
        "mask_dtype": "int64",
        "mask_if_full": True, "instruction": 0, "layout": "batch", "side": "right", "bundles": 1,
    }  # fmt: skip
    shared = SharedStates(PREFIX, ROWS[1], PREFIX[0], PREFIX[0], (5, 6), (7,), "sha")
    return SimpleNamespace(
        folder=SimpleNamespace(location="here"),
        manifest={"extra": {"encoder": {"condition": {**layout, **condition}}}},
        spec={"layers": list(range(LAYERS)), **(spec or {})},
        shared=lambda: shared,
    )


def test_a_batch_is_filled_up_with_zeros_and_a_mask() -> None:
    found = arguments(family(), ROWS, None, None)
    assert found["mask"].tolist() == [[1, 1, 1], [1, 0, 0], [1, 1, 0]]
    assert found["mask"].dtype == torch.int64
    for row, states in zip(ROWS, found["prompt_embeds"], strict=True):
        assert torch.equal(states[: len(row)], row)
        assert not states[len(row) :].any()


@pytest.mark.parametrize(("name", "dtype"), [("bool", torch.bool), ("states", torch.float32)])
def test_masks_on_the_left_and_of_other_types(name: str, dtype: torch.dtype) -> None:
    found = arguments(family(side="left", mask_dtype=name), ROWS, None, 5)
    assert found["mask"].dtype == dtype
    assert found["mask"].int().tolist() == [[0, 0, 1, 1, 1], [0, 0, 0, 0, 1], [0, 0, 0, 1, 1]]
    assert torch.equal(found["prompt_embeds"][1, -1], ROWS[1][0])


@pytest.mark.parametrize(("count", "expected"), [("all", [0, 1]), (1, [0]), (-1, [1]), (0, [])])
def test_the_instructions_states_that_are_part_of_it(count: Any, expected: list[int]) -> None:
    found = arguments(family(instruction=count), ROWS, None, None)["prompt_embeds"]
    assert torch.equal(found[0], torch.cat([PREFIX[expected], ROWS[0]]))


def test_layers_keep_their_axis() -> None:
    layers = torch.nn.utils.rnn.pad_sequence(ROWS, batch_first=True).unflatten(-1, (LAYERS, WIDTH))
    found = arguments(family({"join": "separate"}), ROWS, None, None)["prompt_embeds"]
    assert torch.equal(found, layers)
    found = arguments(family(layout="layers_first"), ROWS, None, None)["prompt_embeds"]
    assert torch.equal(found, layers.permute(2, 0, 1, 3))
    found = arguments(family(bundles=LAYERS), ROWS, None, None)["prompt_embeds"]
    assert torch.equal(found, layers.permute(0, 2, 1, 3))
    found = arguments(family(layout="list"), ROWS, None, None)["prompt_embeds"]
    assert all(torch.equal(one, other) for one, other in zip(found, ROWS, strict=True))


def test_a_full_mask_may_be_left_out() -> None:
    assert arguments(family(mask_if_full=False), ROWS[:1], None, None)["mask"] is None
    assert arguments(family(mask_if_full=False), ROWS, None, None)["mask"] is not None


def test_pooled_vectors_alone() -> None:
    vectors = [torch.ones(5), torch.zeros(5), torch.ones(5)]
    found = arguments(family(states=None, pooled="pooled"), ROWS, vectors, None)
    assert set(found) == {"pooled"}
    assert torch.equal(found["pooled"], torch.stack(vectors))


def test_what_cannot_be_given_is_refused() -> None:
    with pytest.raises(InputError, match="does not fit into 2"):
        arguments(family(), ROWS, None, 2)
    with pytest.raises(InputError, match="no pooled vectors"):
        arguments(family(pooled="pooled"), ROWS, None, None)
    nameless = family()
    nameless.manifest["extra"]["encoder"]["condition"] = None
    with pytest.raises(InputError, match="names no pipeline"):
        arguments(nameless, ROWS, None, None)
