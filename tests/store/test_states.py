"""Storage dtypes: exact where they claim to be, with a measured error where they do not."""

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lidit.errors import InputError, JobError
from lidit.store import channel_statistics, shared_table, storage_loss, text_table
from lidit.store.shared import read_shared
from lidit.store.states import decode_table


def random_states(lengths: list[int], width: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    scales, offsets = torch.logspace(-1, 3, width), 300 * torch.randn(width, generator=generator)
    return [torch.randn(n, width, generator=generator) * scales + offsets for n in lengths]


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 9), max_size=6),
    width=st.integers(1, 17),
    dtype=st.sampled_from(["float32", "bfloat16"]),
)
def test_exact_storages_return_every_bit(lengths: list[int], width: int, dtype: str) -> None:
    states = [s.to(getattr(torch, dtype)) for s in random_states(lengths, width)]
    table = text_table([list(range(n)) for n in lengths], states, dtype, width)
    table.validate(full=True)
    back = decode_table(table)
    assert len(back) == len(states)
    for original, stored in zip(states, back):
        assert stored.dtype == original.dtype
        assert torch.equal(stored, original)


def test_int8_error_is_below_one_percent_of_a_deviation_and_is_what_is_reported() -> None:
    states = random_states([40, 1, 0, 80], 64)
    mean, deviation = channel_statistics(states)
    table = text_table([[0] * len(s) for s in states], states, "int8", 64, mean, deviation)
    error = storage_loss(states, table, mean, deviation)
    # the definition, once more and independently
    exact = torch.cat(states).double()
    stored = torch.cat(decode_table(table, mean, deviation)).double()
    expected = ((stored - exact) / deviation).square().mean().sqrt().item()
    assert error.standardised_rms == pytest.approx(expected, rel=1e-6)
    assert 0.001 < error.standardised_rms < 0.01
    assert error.tokens == 121
    cosine = torch.nn.functional.cosine_similarity(exact - mean, stored - mean, dim=-1)
    assert error.centred_cosine == pytest.approx(cosine.mean().item(), abs=1e-6)
    assert error.lowest_cosine == pytest.approx(cosine.min().item(), abs=1e-6)


def test_standardising_before_int8_is_what_makes_it_accurate() -> None:
    states = random_states([200], 64)
    mean, deviation = channel_statistics(states)
    ids = [[0] * 200]
    with_it = text_table(ids, states, "int8", 64, mean, deviation)
    without = text_table(ids, states, "int8", 64, torch.zeros(64), torch.ones(64))
    good = torch.cat(decode_table(with_it, mean, deviation))
    bad = torch.cat(decode_table(without, torch.zeros(64), torch.ones(64)))
    error_good = ((good - states[0]) / deviation).square().mean().sqrt()
    error_bad = ((bad - states[0]) / deviation).square().mean().sqrt()
    assert error_bad > 50 * error_good


def test_int8_of_states_equal_to_the_mean_is_exact() -> None:
    mean, deviation = torch.tensor([5.0, -3.0]), torch.tensor([2.0, 1.0])
    table = text_table([[1]], [mean[None]], "int8", 2, mean, deviation)
    assert torch.equal(decode_table(table, mean, deviation)[0], mean[None])
    assert storage_loss([mean[None]], table, mean, deviation).centred_cosine == 1.0


def test_columns_are_those_of_the_format() -> None:
    states = random_states([3, 2], 4)
    mean, deviation = channel_statistics(states)
    table = text_table([[7, 8, 9], [1, 2]], states, "int8", 4, mean, deviation)
    assert table.schema.field("tokens").type == pa.int32()
    assert table.schema.field("token_ids").type == pa.list_(pa.int32())
    assert table.schema.field("states").type == pa.large_list(pa.int8())
    assert table.schema.field("scale").type == pa.large_list(pa.float32())
    assert [len(row) for row in table["states"].to_pylist()] == [12, 8]
    assert [len(row) for row in table["scale"].to_pylist()] == [3, 2]
    assert table["token_ids"].to_pylist() == [[7, 8, 9], [1, 2]]
    assert text_table([[1]], [torch.zeros(1, 4)], "bfloat16").schema.field(
        "states"
    ).type == pa.large_list(pa.uint16())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("storage", ["float32", "bfloat16", "int8"])
def test_values_that_are_not_finite_are_refused_and_the_row_named(
    value: float, storage: str
) -> None:
    states = random_states([2, 3], 4)
    states[1][2, 1] = value
    with pytest.raises(JobError, match="row 1"):
        text_table([[0] * 2, [0] * 3], states, storage, 4, torch.zeros(4), torch.ones(4))


def test_mistakes_are_named() -> None:
    with pytest.raises(InputError, match="float16"):
        text_table([[0]], [torch.zeros(1, 4)], "float16")
    with pytest.raises(JobError, match="row 0: 2 token ids"):
        text_table([[0, 1]], [torch.zeros(1, 4)], "float32")
    with pytest.raises(InputError, match="mean and deviation"):
        text_table([[0]], [torch.zeros(1, 4)], "int8")


def test_channel_statistics_are_those_of_numpy() -> None:
    states = random_states([5, 0, 9], 6)
    mean, deviation = channel_statistics(states)
    stacked = np.concatenate([s.numpy() for s in states]).astype(np.float64)
    np.testing.assert_allclose(mean, stacked.mean(0), rtol=1e-6)
    np.testing.assert_allclose(deviation, stacked.std(0), rtol=1e-5)
    assert channel_statistics([torch.ones(4, 2)])[1].tolist() == [1.0, 1.0]
    with pytest.raises(JobError, match="no token"):
        channel_statistics([torch.zeros(0, 2)])


def test_shared_states_keep_compute_dtype_and_statistics_precision() -> None:
    prefix, empty = (s.bfloat16() for s in random_states([5, 1], 8))
    mean, deviation = torch.randn(8) * 1000, torch.rand(8) + 0.5
    back = read_shared(
        shared_table([1, 2, 3, 4, 5], prefix, [9], empty, mean, deviation), "abc", "here"
    )
    assert back.prefix.dtype == torch.bfloat16
    assert torch.equal(back.prefix, prefix)
    assert torch.equal(back.empty, empty)
    assert torch.equal(back.mean, mean)
    assert torch.equal(back.deviation, deviation)
    assert (back.prefix_ids, back.empty_ids) == ((1, 2, 3, 4, 5), (9,))
    no_prefix = shared_table([], torch.zeros(0, 8), [9], empty.float(), mean, deviation)
    assert read_shared(no_prefix, "", "").prefix.shape == (0, 8)
