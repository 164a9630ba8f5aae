"""Reading several layers of an LLM: what it is at the start, what is refused, and that a saved
model is the same.
"""

import pytest
import torch

from lidit.config import EncoderSettings, Recipe
from lidit.config.settings import validate
from lidit.errors import InputError
from lidit.models import LIDiT, PromptCondition

STORED = {"first": 4, "second": 3}
KINDS = ["mean", "learned", "per_block"]


def test_layers_weigh_the_same_at_the_start(make_model, make_text):
    text, timestep = make_text(dtype=torch.float64), torch.tensor([0.2, 0.3, 0.4])
    models = {
        kind: make_model(dtype=torch.float64, stored_layers=STORED, layers=kind) for kind in KINDS
    }
    start = models["mean"].state_dict()
    tokens = {}
    for kind, model in models.items():
        missing, unexpected = model.load_state_dict(start, strict=False)
        assert not unexpected
        for name in missing:
            assert name.endswith("mixture.scores")
            torch.nn.init.zeros_(model.get_parameter(name))
        condition = model.conditioner(text, timestep)
        tokens[kind] = [condition.of_block(number) for number in range(2)]
    for kind in ("learned", "per_block"):
        for mean, found in zip(tokens["mean"], tokens[kind], strict=True):
            torch.testing.assert_close(found, mean, rtol=1e-10, atol=1e-10)


def test_a_blocks_weights_are_its_own(make_model, make_text):
    model, text = make_model(1, stored_layers={"first": 4}, layers="per_block"), make_text(count=1)
    timestep = torch.tensor([0.2, 0.3, 0.4])
    before = model.conditioner(text, timestep)
    with torch.no_grad():
        model.conditioner.branch("first").projection.mixture.scores[2, 0] += 2
    after = model.conditioner(text, timestep)
    assert torch.equal(after.of_block(0), before.of_block(0))
    assert torch.equal(after.tokens, before.tokens)
    assert (after.of_block(1) - before.of_block(1)).abs().max() > 0.01
    model(torch.randn(3, 3, 4, 4), timestep, text).sum().backward()
    assert all(
        row.abs().sum() > 0
        for row in model.conditioner.branch("first").projection.mixture.scores.grad
    )


def test_conditions_of_unequal_lengths_are_joined_and_taken(make_model, make_text):
    model = make_model(1, stored_layers={"first": 4}, layers="per_block")
    parts = [
        model.conditioner(make_text(lengths, count=1), torch.full((len(lengths),), 0.5))
        for lengths in ((2, 5), (3,))
    ]
    joined = PromptCondition.join(parts)
    assert joined.of_blocks.shape[:3] == (3, 2, 5)
    assert joined.mask.sum(1).tolist() == [2, 5, 3]
    taken = joined.take(torch.tensor([2, 0]))
    for number in range(2):
        assert torch.equal(taken.of_block(number)[0, :3], parts[1].of_block(number)[0])
        assert torch.equal(taken.of_block(number)[1, :2], parts[0].of_block(number)[0, :2])


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_model_of_several_layers_is_the_same(make_model, make_text, tmp_path, kind):
    model, text = make_model(stored_layers=STORED, layers=kind), make_text()
    inputs = (torch.randn(3, 3, 4, 4), torch.tensor([0.1, 0.5, 0.9]), text)
    model.save_pretrained(tmp_path)
    loaded = LIDiT.load(tmp_path).eval()
    assert loaded.config.layers == kind
    assert torch.equal(loaded(*inputs), model(*inputs))


@pytest.mark.parametrize(
    ("layers", "stored", "message"),
    [
        (
            "one",
            {"second": 3},
            r"'one' reads one state per token, but encoder second keeps 3 layers " r"apart",
        ),
        (
            "mean",
            None,
            r"'mean' needs several layers of a token, but first, second keep one; .* join: "
            r"separate",
        ),
        ("per_block", {"first": 1}, "'per_block' needs several layers"),
    ],
)
def test_layers_that_do_not_fit_are_refused(make_model, layers, stored, message):
    with pytest.raises(InputError, match=message):
        make_model(stored_layers=stored, layers=layers)


def test_a_recipe_of_layers_that_do_not_fit_is_refused():
    def recipe(layers, *encoders):
        tree = {"name": "x", "corpus": "c", "encoders": list(encoders), "model": {"layers": layers}}
        return validate(Recipe, tree, "r.yaml")

    apart = EncoderSettings(name="a", model="m", layers=(1, 2), join="separate").model_dump()
    joined = EncoderSettings(name="b", model="m", layers="all").model_dump()
    assert recipe("learned", apart, joined).model.layers == "learned"
    with pytest.raises(
        InputError,
        match=r"model.layers: 'one' .* encoder a keeps its layers apart; " r".*concatenate",
    ):
        recipe("one", apart)
    with pytest.raises(
        InputError,
        match=r"model.layers: 'mean' needs several layers of a token; .* join: " r"separate",
    ):
        recipe("mean", joined)
