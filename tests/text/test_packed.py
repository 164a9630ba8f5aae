"""Captions packed one behind the other have the states that they have padded; models that cannot
pack stay padded.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lidit.config import EncoderSettings
from lidit.text import PromptEncoder, resolve_encoder
from lidit.text.batching import plan_batches, plan_packed
from tests.helpers.tiny_models import WINDOW

Make = Callable[..., EncoderSettings]
CAPTIONS = ["a red circle", "a", "two blue squares beside a green triangle", "a cat"]


def load(
    model_of: Callable[[str], Path], settings: Make, family: str, **changes: object
) -> PromptEncoder:
    return PromptEncoder.load(
        resolve_encoder(settings(model_of(family), dtype="float32", **changes)), "cpu"
    )


@pytest.mark.parametrize(
    "family", ["llama", "qwen2", "qwen3", "phi3", "gpt_neox", "mistral", "gemma3"]
)
@pytest.mark.parametrize("layer", [-1, -3])
def test_packed_states_are_the_padded_ones(
    model_of: Callable[[str], Path], settings: Make, family: str, layer: int
) -> None:
    encoder = load(model_of, settings, family, layer=layer, instruction="", max_tokens=WINDOW - 1)
    assert encoder.trunk.packing_agrees(encoder.tokenizer.longest)
    expected = encoder.encode(CAPTIONS)
    encoder.trunk.packs = True
    for found, right in zip(encoder.encode(CAPTIONS, token_budget=12), expected, strict=True):
        assert found.token_ids == right.token_ids
        torch.testing.assert_close(found.states, right.states, rtol=1e-4, atol=1e-5)
    assert encoder.padding([[1] * 9, [1]]).waste == 0


def test_attention_of_another_kind_runs_padded(
    model_of: Callable[[str], Path], settings: Make
) -> None:
    capped = load(model_of, settings, "gemma2")  # caps its scores
    # BOS is before them
    windowed = load(model_of, settings, "gemma3", instruction="", max_tokens=WINDOW)
    for encoder in (capped, windowed):
        longest = encoder.tokenizer.longest
        with pytest.raises(NotImplementedError):
            encoder.trunk.after_context_packed([[5, 6]], longest)
        assert not encoder.trunk.packing_agrees(longest)
        assert encoder.encode(["a cat"])[0].states.isfinite().all(), (
            "the model still attends as it did"
        )


def test_a_caption_sees_neither_its_neighbours_nor_less_than_its_context(
    model_of: Callable[[str], Path], settings: Make
) -> None:
    trunk = load(model_of, settings, "llama").trunk
    alone = trunk.after_context_packed([[7, 8]])
    behind = trunk.after_context_packed([[9, 10, 11], [7, 8]])[3:]
    torch.testing.assert_close(behind, alone, rtol=1e-4, atol=1e-5)
    without = trunk.model(input_ids=torch.tensor([[7, 8]]), use_cache=False).last_hidden_state[0]
    assert not torch.allclose(without, alone, atol=1e-2)


def test_a_model_that_moves_to_the_cpu_runs_padded_there(
    model_of: Callable[[str], Path], settings: Make
) -> None:
    encoder = load(model_of, settings, "llama")
    encoder.trunk.packs = True
    encoder.to("cpu")
    assert encoder.plan([5, 3, 5], 100) == plan_batches([5, 3, 5], 100)


def test_packed_batches_keep_order_and_budget() -> None:
    lengths = [3, 9, 1, 12, 2, 2, 2, 30, 1]
    batches = plan_packed(lengths, 12)
    assert [row for batch in batches for row in batch] == list(range(len(lengths)))
    totals = [sum(lengths[row] for row in batch) for batch in batches]
    assert all(total <= 12 or len(batch) == 1 for total, batch in zip(totals, batches, strict=True))
    assert plan_packed([], 12) == []
    even = [
        sum(batch_lengths)
        for batch_lengths in ([1] * len(rows) for rows in plan_packed([1] * 100, 64))
    ]
    assert max(even) - min(even) <= 1, "no small batch is left for the end"
