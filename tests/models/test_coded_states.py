"""Coded states in a model: whole steps give what their states give, wherever a model
computes them.
"""

from dataclasses import replace

import pytest
import torch

from lidit.errors import InputError
from lidit.models import LIDiT, TextStates
from lidit.store.coding.fit import fit_code
from lidit.store.coding.transform import StateCode, quantise, standardise, step_sizes, varying
from lidit.store.packing import decode, encode

NAME = "first"


@pytest.fixture
def code(make_model) -> StateCode:
    width = 20
    generator = torch.Generator().manual_seed(3)
    mixing = torch.randn(width, width, generator=generator)
    return fit_code(
        [torch.randn(9, width, generator=generator) @ mixing / 5 for _ in range(60)], 0.1
    )


def both(model: LIDiT, text: dict[str, TextStates], code: StateCode) -> tuple[dict, dict]:
    """The same captions twice: as states that the store gives, and as whole steps."""
    projection = model.conditioner.branch(NAME).projection
    entry, mean, deviation = text[NAME], projection.mean, projection.deviation
    flat = entry.states.reshape(-1, entry.states.shape[-1])
    values, scale = quantise(standardise(flat, mean, deviation), code)
    states = decode(values, "coded", scale, mean, deviation, code).view_as(entry.states)
    size = step_sizes(scale, code.step).view(entry.mask.shape)
    coded = replace(entry, states=values.view_as(entry.states), size=size)
    return text | {NAME: replace(entry, states=states)}, text | {NAME: coded}


def condition(model: LIDiT, text: dict[str, TextStates]) -> torch.Tensor:
    rows = len(text[NAME].states)
    return model.conditioner(text, torch.full((rows,), 0.3)).tokens


def test_whole_steps_give_what_their_states_give(make_model, make_text, code) -> None:
    model = make_model()
    model.conditioner.set_code(NAME, code.back)
    states, coded = both(model, make_text(), code)
    assert coded[NAME].states.dtype == torch.int16
    with torch.no_grad():
        assert torch.allclose(condition(model, coded), condition(model, states), atol=2e-5)
        # The code matters: this is no accident of states near zero.
        model.conditioner.set_code(NAME, code.back.roll(1, 0))
        assert not torch.allclose(condition(model, coded), condition(model, states), atol=0.1)


def test_in_bfloat16_the_steps_lose_no_more_than_the_states(make_model, make_text, code) -> None:
    model = make_model()
    model.conditioner.set_code(NAME, code.back)
    states, coded = both(model, make_text(), code)
    with torch.no_grad():
        exact = condition(model, states)
        model.to(torch.bfloat16)
        assert model.conditioner.branch(NAME).projection.steps_to_standard.dtype == torch.float32
        errors = [
            (condition(model, text).float() - exact).norm() / exact.norm()
            for text in (states, coded)
        ]
    assert errors[1] < 1.5 * errors[0] + 0.002


def test_int8_states_need_no_more_than_their_scale(make_model, make_text) -> None:
    model, text = make_model(), make_text()
    projection = model.conditioner.branch(NAME).projection
    entry, known = text[NAME], (projection.mean, projection.deviation)
    values, scale = encode(entry.states.reshape(-1, entry.states.shape[-1]), "int8", *known)
    states = decode(values, "int8", scale, *known).view_as(entry.states)
    size = scale.view(entry.mask.shape)
    coded = text | {NAME: replace(entry, states=values.view_as(entry.states), size=size)}
    assert not model.conditioner.knows_code(NAME)
    with pytest.raises(InputError, match="set_code"):
        condition(model, coded)
    model.conditioner.set_code(NAME, None)
    assert model.conditioner.knows_code(NAME)
    with torch.no_grad():
        expected = condition(model, text | {NAME: replace(entry, states=states)})
        assert torch.allclose(condition(model, coded), expected, atol=2e-5)


def test_the_code_is_in_no_checkpoint(make_model, code) -> None:
    model = make_model()
    before = set(model.state_dict())
    model.conditioner.set_code(NAME, code.back)
    assert set(model.state_dict()) == before


def test_padding_and_stacking_keep_sizes_with_their_tokens(make_model, make_text, code) -> None:
    model = make_model()
    model.conditioner.set_code(NAME, code.back)
    _, coded = both(model, make_text(), code)
    entry = coded[NAME]
    longer = coded | {NAME: entry.pad_to(entry.states.shape[1] + 3)}
    garbage = longer[NAME].size.masked_fill(~longer[NAME].mask, torch.nan)
    twice = {name: value.stack(value) for name, value in coded.items()}
    with torch.no_grad():
        plain = model.conditioner(coded, torch.full((len(entry.states),), 0.3)).pooled
        padded = model.conditioner(
            longer | {NAME: replace(longer[NAME], size=garbage)}, torch.full((len(plain),), 0.3)
        )
        stacked = model.conditioner(twice, torch.full((2 * len(plain),), 0.3)).pooled
        rows = model.conditioner(
            {n: v.rows(slice(1, 2)) for n, v in coded.items()}, torch.full((1,), 0.3)
        ).pooled
    assert torch.allclose(padded.pooled, plain, atol=1e-4)
    assert torch.allclose(stacked[len(plain) :], plain, atol=1e-4)
    assert torch.allclose(rows, plain[1:2], atol=1e-4)
    with pytest.raises(ValueError, match="coded states and others"):
        entry.stack(replace(entry, size=None))


def test_coded_states_without_their_code_are_refused(make_model, make_text, code) -> None:
    model = make_model()
    _, coded = both(model, make_text(), code)
    with pytest.raises(InputError, match="set_code"):
        condition(model, coded)
    with pytest.raises(InputError, match="'first': the code has shape"):
        model.conditioner.set_code(NAME, torch.eye(3))
    wrong = coded | {NAME: replace(coded[NAME], size=coded[NAME].size[:, :1])}
    with pytest.raises(InputError, match="'first': sizes of steps"):
        condition(model, wrong)


def test_a_model_divides_by_the_deviations_that_states_were_coded_with(make_model) -> None:
    mean, deviation = torch.linspace(-500, 500, 20), torch.logspace(-6, 1, 20)
    model = make_model()
    model.conditioner.set_statistics(NAME, mean, deviation)
    assert torch.equal(
        model.conditioner.branch(NAME).projection.deviation, varying(mean, deviation)
    )
