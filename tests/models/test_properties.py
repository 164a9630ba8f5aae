"""What must hold for any weights: masks, batches, padding, symmetry, gradients, precision, clear
refusals.
"""

from collections import Counter
from dataclasses import replace

import pytest
import torch

from lidit.config import ModelSettings
from lidit.errors import InputError
from lidit.models import LIDiT, TextStates
from lidit.models.compiled import compile_blocks, why_not_compiled
from lidit.models.fusion import FusionBranch
from lidit.models.refiner import RefinerBlock
from lidit.models.transformer import LIDiTBlock

VARIANTS = [
    {},
    {"refiner": {"causal": True}},
    {"refiner": {"mixing": False}},
    {"refiner": {"depth": 0}},
    {"fusion": {"mode": "concatenation"}},
]
EXACT = {"rtol": 0, "atol": 0}
ROUNDING = {"rtol": 1e-4, "atol": 1e-5}


def latents(batch=3, size=(8, 8)):
    return torch.randn(batch, 3, *size)


def run(model, text, x, t=None):
    return model(x, torch.linspace(0.1, 0.9, len(x)) if t is None else t, text)


def rows(text, order):
    return {
        name: replace(e, states=e.states[order], mask=e.mask[order]) for name, e in text.items()
    }


def test_refiner_and_fusion_start_as_the_plain_projection(make_model, make_text):
    model, text = make_model(awake=False), make_text()
    condition = model.conditioner(text, torch.rand(3))
    parts = [
        branch.projection(text[name].states)[..., 0, :].masked_fill(~text[name].mask[..., None], 0)
        for name, branch in zip(model.conditioner.names, model.conditioner.branches, strict=True)
    ]
    torch.testing.assert_close(condition.tokens, torch.cat(parts, dim=1), **EXACT)


def test_model_starts_by_predicting_zero(make_model, make_text):
    assert not run(make_model(awake=False), make_text(), latents()).any()


@pytest.mark.parametrize("settings", VARIANTS)
@pytest.mark.parametrize("garbage", [1e4, torch.nan, torch.inf])
def test_content_behind_a_mask_changes_no_output_and_no_gradient(
    make_model, make_text, settings, garbage
):
    model, clean, x = make_model(**settings), make_text(lengths=(4, 1, 0)), latents()
    dirty = {
        name: replace(entry, states=torch.where(entry.mask[..., None], entry.states, garbage))
        for name, entry in clean.items()
    }
    results = []
    for text in (clean, dirty):
        model.zero_grad()
        prediction = run(model, text, x)
        prediction.square().sum().backward()
        results.append([prediction, *(parameter.grad for parameter in model.parameters())])
    for expected, found in zip(*results, strict=True):
        assert torch.isfinite(expected).all()
        torch.testing.assert_close(found, expected, **EXACT)


@pytest.mark.parametrize("settings", VARIANTS)
def test_every_valid_caption_token_and_the_prefix_matter(make_model, make_text, settings):
    model, text, x = make_model(**settings), make_text(), latents()
    before = run(model, text, x)
    last = text["first"].mask[0].sum() - 1
    states = text["first"].states.clone()
    states[0, last] += 1
    assert (
        run(model, {**text, "first": replace(text["first"], states=states)}, x)[0] - before[0]
    ).abs().max() > 1e-4
    if (
        settings.get("refiner", {}).get("depth") == 0
        or settings.get("refiner", {}).get("mixing") is False
    ):
        # without a refiner that mixes, only fusion could see the prefix; asserted below for the
        # mixing ones
        return
    prefix = text["first"].prefix + 1
    changed = run(model, {**text, "first": replace(text["first"], prefix=prefix)}, x)
    assert (changed - before).abs().max() > 1e-4


@pytest.mark.parametrize("settings", VARIANTS)
def test_permuting_a_batch_permutes_the_outputs(make_model, make_text, settings):
    model, text, x, t = (
        make_model(**settings),
        make_text(),
        latents(),
        torch.tensor([0.1, 0.5, 0.9]),
    )
    order = torch.tensor([2, 0, 1])
    torch.testing.assert_close(
        run(model, rows(text, order), x[order], t[order]), run(model, text, x, t)[order], **ROUNDING
    )


@pytest.mark.parametrize("settings", VARIANTS)
def test_padding_to_more_tokens_or_running_alone_changes_nothing(make_model, make_text, settings):
    model, text = make_model(dtype=torch.float64, **settings), make_text(dtype=torch.float64)
    x, t = latents().double(), torch.tensor([0.1, 0.5, 0.9])
    expected = run(model, text, x, t)
    padded = {name: entry.pad_to(entry.states.shape[1] + 9) for name, entry in text.items()}
    torch.testing.assert_close(run(model, padded, x, t), expected, rtol=1e-9, atol=1e-9)
    for i in range(3):
        alone = {
            name: TextStates.collate([entry.states[i][entry.mask[i]]], entry.prefix)
            for name, entry in text.items()
        }
        torch.testing.assert_close(
            run(model, alone, x[i : i + 1], t[i : i + 1]), expected[i : i + 1], rtol=1e-9, atol=1e-9
        )


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_caption_of_several_latents_is_refined_once_and_nothing_else_changes(
    make_model, make_text, checkpointing
):
    """Outputs and gradients are those of the repeated captions; each caption keeps the timestep of
    its latents.
    """
    model, text = make_model(dtype=torch.float64), make_text(dtype=torch.float64)
    if checkpointing:
        model.train().enable_gradient_checkpointing()
    owner = torch.tensor([2, 0, 0, 1, 2])
    x, t = latents(5).double(), torch.tensor([0.1, 0.5, 0.9])[owner]
    refined = []
    for branch in model.conditioner.branches:
        branch.register_forward_hook(
            lambda _module, _inputs, output: refined.append(len(output[0]))
        )
    results = []
    for entry, of_latent in ((rows(text, owner), None), (text, owner)):
        model.zero_grad()
        prediction = model(x, t, entry, of_latent)
        prediction.square().sum().backward()
        results.append([prediction, *(parameter.grad for parameter in model.parameters())])
    assert refined == [5, 5, 3, 3]
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_latents_of_a_caption_share_its_keys_and_values(make_model, make_text):
    """To rounding: a matrix product of fewer rows may add in another order."""
    model, text = make_model(dtype=torch.float64), make_text(dtype=torch.float64)
    owner = torch.tensor([2, 0, 0, 1, 2, 2, 2])
    x, t = latents(7).double(), torch.tensor([0.1, 0.5, 0.9])[owner]
    projected = []
    for block in model.transformer.blocks:
        block.cross_attention.key_value.register_forward_hook(
            lambda _module, _inputs, output: projected.append(len(output))
        )
    with torch.no_grad():
        condition = model.conditioner(text, torch.tensor([0.1, 0.5, 0.9]))
        repeated = model.transformer(x, t, condition.take(owner))
        shared = model.transformer(x, t, condition.shared(owner))
    depth = len(model.transformer.blocks)
    assert projected == [7] * depth + [3] * depth
    torch.testing.assert_close(shared, repeated, rtol=1e-9, atol=1e-9)


def test_latents_without_a_caption_of_their_own_are_refused(make_model, make_text):
    model, text = make_model(), make_text()
    with pytest.raises(InputError, match="2 latents need states of as many captions, got 3"):
        run(model, text, latents(2))
    unused = model(latents(1), torch.full((1,), 0.3), text, torch.tensor([1]))
    assert unused.shape == (1, 3, 8, 8), "a caption may be nobody's"


def test_one_llm_with_itself_twice_is_symmetric():
    model = LIDiT.from_settings(
        ModelSettings(width=32, depth=1, heads=4, patch_size=2),
        {"left": 20, "right": 20, "third": 20},
        3,
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    left, right, _ = model.conditioner.branches
    right.load_state_dict(left.state_dict())
    model.conditioner.fusion.blocks[1].load_state_dict(
        model.conditioner.fusion.blocks[0].state_dict()
    )
    entries = [
        TextStates.collate([torch.randn(n, 20) for n in (3, 5)], torch.randn(4, 20))
        for _ in range(3)
    ]
    t = torch.tensor([0.3, 0.6])
    same = model.conditioner(
        {"left": entries[0], "right": entries[0], "third": entries[1]}, t
    ).tokens
    torch.testing.assert_close(same[:, :5], same[:, 5:10], **ROUNDING)
    straight = model.conditioner(
        {"left": entries[0], "right": entries[1], "third": entries[2]}, t
    ).tokens
    swapped = model.conditioner(
        {"left": entries[1], "right": entries[0], "third": entries[2]}, t
    ).tokens
    torch.testing.assert_close(straight[:, :5], swapped[:, 5:10], **ROUNDING)
    torch.testing.assert_close(straight[:, 5:10], swapped[:, :5], **ROUNDING)
    assert (straight[:, :5] - straight[:, 5:10]).abs().max() > 0.1


def test_a_branch_reads_only_the_others(make_model):
    """Query from one's own tokens, keys and values from the other LLM's: without the others'
    content nothing mixes.
    """
    model = make_model()
    fusion = model.conditioner.fusion
    states = [torch.randn(1, 3, 32), torch.randn(1, 4, 32)]
    masks = [torch.ones(1, 3, dtype=torch.bool), torch.ones(1, 4, dtype=torch.bool)]
    conditions = [torch.randn(1, 32)] * 2
    before = fusion(states, masks, conditions)
    changed = states[0].clone()
    changed[:, 0] += torch.randn(32)
    after = fusion([changed, states[1]], masks, conditions)
    torch.testing.assert_close(after[0][:, 1:], before[0][:, 1:], **EXACT)
    assert (after[1] - before[1]).abs().min(dim=-1).values.max() > 0
    assert (after[1] - before[1]).abs().max() > 1e-3


@pytest.mark.parametrize(
    "settings", [*VARIANTS, {"refiner": {"gated": False}}, {"activation_checkpointing": True}]
)
def test_gradients_reach_every_parameter_after_one_step_from_zero(make_model, make_text, settings):
    model, text, x = make_model(awake=False, **settings), make_text(), latents()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    target = torch.randn_like(x)
    for _ in range(4):  # output, then gates, then what is behind them, then the fusion's own gates
        optimizer.zero_grad()
        (run(model, text, x) - target).square().mean().backward()
        optimizer.step()
    unmoved_by_design = (
        ("query_norm", "key_norm") if settings.get("refiner", {}).get("mixing") is False else ()
    )
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        if name.startswith("conditioner") and any(word in name for word in unmoved_by_design):
            continue  # a softmax over the own token alone is 1 whatever its query and key are
        assert parameter.grad.abs().sum() > 0, name


def test_activation_checkpointing_changes_no_gradient(make_model, make_text):
    torch.manual_seed(1)
    plain = make_model()
    checkpointed = LIDiT.from_config(plain.config)
    checkpointed.load_state_dict(plain.state_dict())
    checkpointed.enable_gradient_checkpointing()
    text, x = make_text(), latents()
    repeated = {
        name
        for name, part in checkpointed.named_modules()
        if isinstance(part, (LIDiTBlock, RefinerBlock, FusionBranch))
    }
    calls = Counter()
    for name in repeated:
        checkpointed.get_submodule(name).register_forward_pre_hook(
            lambda *_, name=name: calls.update([name])
        )
    for model in (plain, checkpointed):
        run(model, text, x).square().mean().backward()
    assert calls == dict.fromkeys(repeated, 2), "not every block ran again in the backward pass"
    assert len(repeated) == 2 + 2 * 2 + 2
    for expected, found in zip(plain.parameters(), checkpointed.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad, **ROUNDING)


def test_of_several_blocks_one_is_computed_again(make_model, make_text):
    settings = ModelSettings(
        width=32,
        depth=5,
        heads=2,
        patch_size=4,
        activation_checkpointing=True,
        checkpointed_every=3,
    )
    model = LIDiT.from_settings(settings, widths(make_text()), 3)
    calls = Counter()
    for number, block in enumerate(model.transformer.blocks):
        block.register_forward_pre_hook(lambda *_, number=number: calls.update([number]))
    run(model, make_text(), latents()).square().mean().backward()
    assert calls == {0: 2, 1: 1, 2: 1, 3: 2, 4: 1}


def widths(text):
    return {name: entry.states.shape[-1] for name, entry in text.items()}


def test_a_machine_without_a_compiler_says_so(monkeypatch):
    assert "longer than it saves" in why_not_compiled(torch.device("cpu"))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", "/nowhere")
    assert "no C compiler" in why_not_compiled(torch.device("cuda"))


def test_any_size_divisible_by_the_patch_in_one_process(make_model, make_text):
    model, text = make_model(), make_text()
    for size in [(4, 4), (8, 16), (16, 8), (2, 30), (10, 14)]:
        assert run(model, text, latents(size=size)).shape == (3, 3, *size)
    with pytest.raises(InputError, match="7 x 8 cannot be cut into patches of 2"):
        run(model, text, latents(size=(7, 8)))


def test_a_token_knows_its_position(make_model, make_text):
    """The same content in every patch still gives different outputs: the ResBlock's border reaches
    inwards.
    """
    prediction = run(make_model(), make_text(), torch.ones(3, 3, 8, 8))
    corner, middle = prediction[:, :, :2, :2], prediction[:, :, 2:4, 2:4]
    assert (corner - middle).abs().max() > 1e-2


def test_one_token_and_empty_captions(make_model, make_text):
    model, x = make_model(), latents()
    assert torch.isfinite(run(model, make_text(lengths=(1, 1, 1)), x)).all()
    nothing = make_text(lengths=(0, 2, 0), count=1)
    alone = make_model(1)
    # Attention over nothing is 0 on one device and NaN on another, so a row without tokens shows
    # one token of zeros.
    condition = alone.conditioner(nothing, torch.rand(3))
    assert condition.mask.sum(1).tolist() == [1, 2, 1]
    assert not condition.tokens[[0, 2]].any()
    prediction = run(alone, nothing, x)
    prediction.sum().backward()
    assert torch.isfinite(prediction).all()
    assert all(torch.isfinite(parameter.grad).all() for parameter in alone.parameters())


def test_a_batch_of_nothing_but_empty_captions(make_model):
    """No caption beside them gives the batch a width: a row's result must not depend on that."""
    for count, tokens in ((1, 0), (2, 0), (2, 3)):
        model = make_model(count)
        widths = {
            name: model.conditioner.branch(name).projection.linear.in_features
            for name in model.conditioner.names
        }
        prefixes = {name: torch.randn(tokens, width) for name, width in widths.items()}
        nothing = {name: [torch.zeros(0, width)] * 3 for name, width in widths.items()}
        empty = {name: TextStates.collate(nothing[name], prefixes[name]) for name in widths}
        beside = {
            name: TextStates.collate([*nothing[name], torch.randn(2, width)], prefixes[name])
            for name, width in widths.items()
        }
        x, t = torch.randn(4, 3, 8, 8), torch.rand(4)
        alone = model(x[:3], t[:3], empty)
        assert torch.isfinite(alone).all()
        torch.testing.assert_close(alone, model(x, t, beside)[:3])


def test_bfloat16_stays_within_three_percent_of_float32(make_model, make_text):
    model, text, x = make_model(awake=False, width=96, depth=4), make_text(), latents()
    with torch.no_grad():
        for parameter in model.parameters():
            # gates open as far as early training opens them
            parameter.add_(0.02 * torch.randn_like(parameter))
    exact = run(model, text, x)
    rounded = run(model.to(torch.bfloat16), text, x)
    assert rounded.dtype == torch.bfloat16
    assert ((rounded.float() - exact).norm() / exact.norm()).item() < 0.03


def test_statistics_survive_a_cast_to_bfloat16(make_model):
    model = make_model()
    projection = model.conditioner.branches[0].projection
    mean = projection.mean.clone() + 500
    model.conditioner.set_statistics("first", mean, projection.deviation)
    model.to(torch.bfloat16)
    assert projection.mean.dtype == torch.float32
    assert projection.linear.weight.dtype == torch.bfloat16
    torch.testing.assert_close(projection.mean, mean, **EXACT)


def test_standardisation_is_clamped_at_ten_and_constant_channels_are_centred(make_model):
    model = make_model(1)
    width = 20
    deviation = torch.ones(width)
    # dividing by rounding noise would make noise ten deviations large
    deviation[3], deviation[4] = 0, 1e-7
    model.conditioner.set_statistics("first", torch.full((width,), 7.0), deviation)
    projection = model.conditioner.branches[0].projection
    states = torch.full((1, width), 7.0)
    states[0, 0], states[0, 1], states[0, 4] = 1e6, -1e6, 7.000001
    expected = torch.zeros(1, width)
    expected[0, 0], expected[0, 1] = 10, -10
    torch.testing.assert_close(
        projection(states)[..., 0, :], projection.linear(expected), **ROUNDING
    )


def test_wrong_states_are_refused_by_the_encoders_name(make_model, make_text):
    model, text, x = make_model(), make_text(), latents()
    with pytest.raises(InputError, match=r"second.*missing"):
        run(model, {"first": text["first"]}, x)
    with pytest.raises(InputError, match=r"third.*not used"):
        run(model, {**text, "third": text["first"]}, x)
    narrow = replace(text["second"], states=text["second"].states[..., :5])
    with pytest.raises(InputError, match="'second': states are 5 wide, the model expects 12"):
        run(model, {**text, "second": narrow}, x)
    prefix = replace(text["second"], prefix=torch.randn(2, 20))
    with pytest.raises(InputError, match="'second': prefix are 20 wide"):
        run(model, {**text, "second": prefix}, x)
    with pytest.raises(InputError, match="'first': mask must be bool"):
        run(model, {**text, "first": replace(text["first"], mask=text["first"].mask.float())}, x)
    with pytest.raises(InputError, match="'first': mean has shape \\[3\\]"):
        model.conditioner.set_statistics("first", torch.zeros(3), torch.ones(20))
    with pytest.raises(InputError, match="'first': deviation holds"):
        model.conditioner.set_statistics("first", torch.zeros(20), torch.full((20,), torch.nan))
    with pytest.raises(InputError, match="no encoder 'fourth'; it was built for first, second"):
        model.conditioner.set_statistics("fourth", torch.zeros(20), torch.ones(20))


def test_impossible_models_are_refused():
    with pytest.raises(InputError, match="'none' takes exactly one encoder"):
        LIDiT.from_settings(
            ModelSettings.model_validate({"fusion": {"mode": "none"}}), {"a": 4, "b": 4}, 3
        )
    with pytest.raises(InputError, match="at least one encoder"):
        LIDiT.from_settings(ModelSettings(), {}, 3)
    with pytest.raises(InputError, match="width 30 is not divisible by 4 heads"):
        LIDiT.from_settings(ModelSettings(width=30, heads=4), {"a": 4}, 3)


def test_the_prefix_is_projected_once_whatever_the_batch(make_model, make_text):
    model, text = make_model(1), make_text(count=1)
    seen = []
    projection = model.conditioner.branches[0].projection
    projection.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape))
    run(model, text, latents())
    assert torch.Size([3, 20]) in seen


@pytest.mark.parametrize(
    "settings",
    [
        {},
        pytest.param({"refiner": {"causal": True}}, marks=pytest.mark.slow),
        pytest.param({"refiner": {"depth": 0}}, marks=pytest.mark.slow),
    ],
)
def test_compiles_into_one_graph(make_model, make_text, settings):
    """fullgraph refuses any graph break; the eager backend keeps code generation out
    of the test.
    """
    model, text, x = make_model(**settings), make_text(), latents()
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(run(compiled, text, x), run(model, text, x), **ROUNDING)
    shared = (latents(4), torch.full((4,), 0.3), text, torch.tensor([0, 2, 2, 1]))
    torch.testing.assert_close(compiled(*shared), model(*shared), **ROUNDING)


@pytest.mark.slow
def test_compiled_blocks_compute_the_same_whatever_the_length(make_model, make_text):
    model, text, x = make_model(), make_text(), latents()
    expected = {extra: run(model, lengthened(text, extra), x) for extra in (0, 3)}
    torch.compiler.reset()
    compile_blocks(model, backend="eager")
    for extra, right in expected.items():
        torch.testing.assert_close(run(model, lengthened(text, extra), x), right, **ROUNDING)
    compiled = [
        part for part in model.modules() if getattr(part, "_compiled_call_impl", None) is not None
    ]
    assert {type(part).__name__ for part in compiled} >= {
        "LIDiTBlock",
        "PositionBlock",
        "RefinerBlock",
    }


@pytest.mark.slow  # compiles
def test_blocks_are_compiled_once_for_all_lengths_and_sizes(make_model, make_text):
    """Every caption length, aspect and batch of a training runs in graphs that are there already,
    without a break in any.
    """
    model, text, graphs = make_model(), make_text(), []

    def counting(module, _):
        graphs.append(module)
        return module.forward

    torch.compiler.reset()
    compile_blocks(model, backend=counting)
    run(model, text, latents())
    square = len(graphs)
    # Two sides that are equal at first are one to torch.
    run(model, text, latents(size=(8, 16)))
    once = len(graphs)
    assert square <= once <= square + 1
    for extra, size in zip((3, 11, 27, 60), [(8, 8), (16, 8), (4, 12), (8, 16)]):
        run(model, lengthened(text, extra), latents(size=size))
    assert len(graphs) == once


def lengthened(text, extra):
    return {name: entry.pad_to(entry.states.shape[1] + extra) for name, entry in text.items()}


def test_lengths_are_rounded_up_behind_the_mask(make_model, make_text):
    model, text, x = make_model(), make_text(), latents()
    rounded = {name: entry.rounded(16) for name, entry in text.items()}
    assert all(entry.states.shape[1] % 16 == 0 for entry in rounded.values())
    assert all(entry.rounded(1) is entry for entry in text.values())
    torch.testing.assert_close(run(model, rounded, x), run(model, text, x), **ROUNDING)
