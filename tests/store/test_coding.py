"""The code of states: integers come back exactly and everywhere, and the error is the one that was
asked for.
"""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from lidit.errors import InputError, JobError
from lidit.models import conditioner
from lidit.store.coding import compiled, rans, transform
from lidit.store.coding.fit import entropy_model, fit_code
from lidit.store.coding.transform import StateCode, exactly, quantise, restore

Values = NDArray[np.int16]


def model_of(width: int, seed: int) -> rans.Model:
    """Components of very different spread, from one that is hardly ever off zero to one of hundreds
    of values.
    """
    random = np.random.default_rng(seed)
    spread = np.geomspace(0.05, 60, width)
    drawn = np.abs(np.rint(random.standard_normal((400, width)) * spread)).astype(int)
    return entropy_model(
        np.stack([np.bincount(column, minlength=drawn.max() + 1) for column in drawn.T]).astype(
            float
        )
    )


def drawn(tokens: list[int], width: int, seed: int) -> tuple[Values, NDArray[np.uint8]]:
    """Integers with many escapes and the ends of the type, and scales."""
    random = np.random.default_rng(seed)
    values = np.rint(random.standard_t(1, (sum(tokens), width)) * np.geomspace(0.05, 60, width))
    values[random.random(values.shape) < 0.01] = 32767
    values[random.random(values.shape) < 0.01] = -32768
    return values.clip(-32768, 32767).astype(np.int16), random.integers(0, 256, sum(tokens)).astype(
        np.uint8
    )


def joined(rows: list[bytes]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    return np.frombuffer(b"".join(rows), np.uint8), np.cumsum([0, *map(len, rows)], dtype=np.int64)


@settings(max_examples=20, deadline=None)
@given(
    tokens=st.lists(st.integers(0, 9), min_size=1, max_size=6),
    width=st.integers(1, 40),
    seed=st.integers(0, 2**32 - 1),
)
def test_integers_come_back_and_compiled_code_writes_the_same_bytes(
    tokens: list[int], width: int, seed: int
) -> None:
    model, (values, scale) = model_of(width, seed), drawn(tokens, width, seed)
    counts = np.asarray(tokens, np.int64)
    ends = np.cumsum([0, *tokens])
    rows = [rans.encode_row(values[a:b], scale[a:b], model) for a, b in pairwise(ends)]
    assert compiled.is_compiled()
    assert compiled.encode_rows(values, scale, counts, model) == rows
    content, places = joined(rows)
    for decode in (rans.decode_rows, compiled.decode_rows):
        found, scales = decode(content, places, counts, model)
        assert np.array_equal(found, values)
        assert np.array_equal(scales, scale)
    # Any row alone.
    row = seed % len(rows)
    content, places = joined(rows[row : row + 1])
    for decode in (rans.decode_rows, compiled.decode_rows):
        found, _ = decode(content, places, counts[row : row + 1], model)
        assert np.array_equal(found, values[ends[row] : ends[row + 1]])


def test_bytes_that_were_not_written_are_refused_alike() -> None:
    model, (values, scale) = model_of(24, 1), drawn([5, 7], 24, 1)
    counts = np.asarray([5, 7], np.int64)
    content, places = joined(compiled.encode_rows(values, scale, counts, model))
    refused = 0
    for position in range(len(content)):
        damaged = content.copy()
        damaged[position] ^= 16
        answers = []
        for decode in (rans.decode_rows, compiled.decode_rows):
            try:
                found, scales = decode(damaged, places, counts, model)
                answers.append(found.tobytes() + scales.tobytes())
            except InputError:
                answers.append(b"refused")
        assert answers[0] == answers[1]
        refused += answers[0] == b"refused"
    assert refused > len(content) / 4  # an escaped value may pass: rows have checksums, too
    for broken in (places[:-1], places - places % 4 + 1):
        with pytest.raises(InputError, match="not what the entropy coder wrote"):
            rans.decode_rows(content, broken, counts[: len(broken) - 1] + 10_000, model)


def test_the_rate_is_that_of_the_model() -> None:
    width, tokens = 200, 300
    random = np.random.default_rng(0)
    spread = np.geomspace(0.3, 12, width)
    train = np.rint(random.standard_normal((20_000, width)) * spread).astype(np.int16)
    test = np.rint(random.standard_normal((tokens, width)) * spread).astype(np.int16)
    counts = [np.bincount(np.abs(column), minlength=100) for column in train.T]
    model = entropy_model(np.stack(counts).astype(float))
    rows = compiled.encode_rows(test, np.zeros(tokens, np.uint8), np.asarray([tokens]), model)
    bits = 8 * len(rows[0]) / test.size
    shares = np.stack([np.bincount(column + 100, minlength=200) for column in train.T]) / len(train)
    ideal = -np.log2(shares[np.arange(width), test + 100].clip(1e-5)).mean()
    assert ideal < bits < ideal + 32 / width + 0.03  # a state of 32 bits per token, and little else


def test_tables_that_cannot_be_decoded_with_are_refused() -> None:
    good = model_of(5, 0)
    for change in (lambda f: f[0, 0] + 1, lambda f: 0):
        frequencies = good.frequencies.copy()
        frequencies[0, 0] = change(frequencies)
        with pytest.raises(InputError, match="sum to 4096"):
            rans.Model(frequencies, good.radius)


def correlated(captions: int, seed: int, width: int = 48) -> list[torch.Tensor]:
    """Standardised states of captions whose tokens lie near a few directions and differ in size."""
    mixing = torch.randn(width, width, generator=torch.Generator().manual_seed(7)) * torch.logspace(
        0, -1.5, width
    )
    mixing /= (mixing.square().sum(1, keepdim=True)).sqrt()
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, 30, (captions,), generator=generator).tolist()
    return [
        torch.randn(n, width, generator=generator)
        @ mixing.T
        * torch.rand(n, 1, generator=generator).add(0.6)
        for n in lengths
    ]


@pytest.mark.parametrize("error", [0.05, 0.1, 0.3])
def test_the_error_is_the_one_that_was_asked_for(error: float) -> None:
    code = fit_code(correlated(300, 0), error)
    z = torch.cat(correlated(100, 1))
    values, scale = quantise(z, code)
    off = restore(values, scale, code) - z
    assert off.square().mean().sqrt().item() == pytest.approx(error, rel=0.05)
    assert torch.allclose(code.basis.T @ code.basis, torch.eye(48), atol=1e-5)
    # No token is much worse than the others, large or small.
    relative = off.norm(dim=1) / z.norm(dim=1)
    assert relative.max() < 2 * relative.mean()


def test_other_data_costs_rate_and_no_error() -> None:
    code = fit_code(correlated(300, 0), 0.1)
    assert code.model is not None
    rates, errors = [], []
    for z in (
        torch.cat(correlated(100, 1)),
        torch.randn(1500, 48, generator=torch.Generator().manual_seed(2)),
    ):
        values, scale = quantise(z, code)
        (row,) = compiled.encode_rows(
            values.numpy(), scale.numpy(), np.asarray([len(z)]), code.model
        )
        rates.append(8 * len(row) / z.numel())
        errors.append((restore(values, scale, code) - z).square().mean().sqrt().item())
    assert rates[1] > rates[0] + 0.5
    # What one step can lose at most; components that never leave zero lose less.
    assert (
        max(errors)
        < 1.02 * code.step * 2 ** ((transform.LARGEST - transform.MIDDLE) / 16) / 12**0.5
    )


def test_states_beside_coded_ones_lose_nothing_but_rounding() -> None:
    code = fit_code(correlated(300, 0), 0.2)
    z = torch.cat([*correlated(3, 1), torch.zeros(1, 48)])
    values, size = exactly(z, code)
    assert torch.allclose(values.float() @ code.back * size[:, None], z, atol=6e-4)


def test_a_code_needs_two_captions() -> None:
    with pytest.raises(JobError, match="choose int8"):
        fit_code([torch.randn(5, 4), torch.zeros(0, 4)], 0.1)


def test_the_store_clamps_where_the_model_does() -> None:
    assert (transform.LIMIT, transform.CONSTANT) == (
        conditioner.STANDARDISED_LIMIT,
        conditioner.CONSTANT,
    )


def test_a_token_of_any_size_is_coded() -> None:
    code: StateCode = fit_code(correlated(300, 0), 0.1)
    z = torch.stack([torch.zeros(48), torch.full((48,), 10.0), torch.full((48,), 1e-3)])
    back = restore(*quantise(z, code), code)
    assert torch.equal(back[0], torch.zeros(48))
    assert (back[1] - z[1]).norm() < 0.2 * z[1].norm()
    assert torch.isfinite(back).all()
