"""The states are those of the untouched model: same ids, same block, whatever the batch, padding
and neighbours.
"""

import functools
import gc
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModel

from lidit.config import EncoderSettings
from lidit.errors import InputError
from lidit.text import PromptEncoder, resolve_encoder
from tests.helpers.tiny_models import (
    CAUSAL_FAMILIES,
    ENCODER_FAMILIES,
    LAYERS,
    VISION_FAMILIES,
    WINDOW,
    break_weights,
)

CAPTIONS = [
    "a red circle",
    "",
    "two yellow triangles left of a large white star, photographed in the evening light, " * 2,
    "一个红色的圆形和一个蓝色的正方形",
    "x",
    "naïve café, ein großer Würfel <|im_end|> on a green field",
]
# more tokens than the window
LONG_PREFIX = "Describe the image by detailing the color, shape, size"
SHORT_PREFIX = "photo:"

Make = Callable[..., EncoderSettings]


@functools.lru_cache(maxsize=1)
def whole_model(folder: str) -> torch.nn.Module:
    return AutoModel.from_pretrained(folder, dtype=torch.float32).eval()


def full_states(
    folder: str, context: tuple[int, ...], ids: tuple[int, ...], layer: int, part: str = ""
) -> torch.Tensor:
    """[T, W]: the caption's rows of `hidden_states[layer]` of the whole model, run on this one
    sequence alone.
    """
    model = getattr(whole_model(folder), part) if part else whole_model(folder)
    with torch.no_grad():
        output = model(input_ids=torch.tensor([[*context, *ids]]), output_hidden_states=True)
    states = output.last_hidden_state if layer == -1 else output.hidden_states[layer]
    return states[0, len(context) :]


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert found.shape == expected.shape
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("prefix", [LONG_PREFIX, SHORT_PREFIX, ""])
@pytest.mark.parametrize("family", [*CAUSAL_FAMILIES, *VISION_FAMILIES])
def test_causal_states_equal_the_full_model(
    family: str, prefix: str, model_of: Callable[[str], Path], settings: Make
) -> None:
    spec = resolve_encoder(settings(model_of(family), instruction=prefix), "cpu")
    encoder = PromptEncoder.load(spec, "cpu")
    part = "language_model" if family in VISION_FAMILIES else ""
    context = encoder.tokenizer.context_ids
    assert (len(context) > WINDOW) == (prefix == LONG_PREFIX)
    for found in encoder.encode(CAPTIONS):
        expected = full_states(spec.folder, context, found.token_ids, -3, part)
        assert relative(found.states, expected) < 1e-5
    ids, states = encoder.prefix_states()
    assert len(ids) == len(states) == (len(context) if prefix else 0)
    if prefix:
        assert relative(states, full_states(spec.folder, (), ids, -3, part)) < 1e-5


@pytest.mark.parametrize("layer", [1, -2, -1])
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_neox"])
def test_every_layer_counts_as_in_transformers(
    family: str, layer: int, model_of: Callable[[str], Path], settings: Make
) -> None:
    spec = resolve_encoder(settings(model_of(family), layer=layer), "cpu")
    encoder = PromptEncoder.load(spec, "cpu")
    found = encoder.encode(CAPTIONS[:1])[0]
    assert (
        relative(
            found.states,
            full_states(spec.folder, encoder.tokenizer.context_ids, found.token_ids, layer),
        )
        < 1e-5
    )


@pytest.mark.parametrize("layer", [-3, -1])
@pytest.mark.parametrize("family", ENCODER_FAMILIES)
def test_encoders_states_are_stored_whole(
    family: str, layer: int, model_of: Callable[[str], Path], settings: Make
) -> None:
    spec = resolve_encoder(
        settings(model_of(family), kind="encoder", layer=layer, max_tokens=40), "cpu"
    )
    encoder = PromptEncoder.load(spec, "cpu")
    part = {"clip": "text_model", "t5": "encoder"}.get(family, "")
    for found in encoder.encode(CAPTIONS):
        assert (
            relative(found.states, full_states(spec.folder, (), found.token_ids, layer, part))
            < 1e-5
        )
    assert encoder.prefix_states()[1].shape == (0, spec.width)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "gpt_neox"])
def test_without_the_causal_mask_early_tokens_see_later_ones(
    family: str, model_of: Callable[[str], Path], settings: Make
) -> None:
    folder = model_of(family)

    def first_token(kind: str) -> list[torch.Tensor]:
        encoder = PromptEncoder.load(
            resolve_encoder(settings(folder, kind=kind, instruction=""), "cpu"), "cpu"
        )
        found = encoder.encode(["a red circle", "a red square", "x"])  # padded
        alone = [encoder.encode([caption])[0] for caption in ("a red circle", "a red square", "x")]
        for together, single in zip(found, alone):
            assert relative(together.states, single.states) < 1e-5
        return [caption.states[0] for caption in found[:2]]

    assert torch.equal(*first_token("causal"))
    one, other = first_token("unmasked")
    assert relative(one, other) > 1e-2


def test_unmasked_states_equal_a_model_built_without_the_mask(
    model_of: Callable[[str], Path], settings: Make
) -> None:
    spec = resolve_encoder(
        settings(model_of("llama"), kind="unmasked", instruction=SHORT_PREFIX), "cpu"
    )
    encoder = PromptEncoder.load(spec, "cpu")
    model = AutoModel.from_pretrained(spec.folder, dtype=torch.float32).eval()
    context = encoder.tokenizer.context_ids
    for found in encoder.encode(CAPTIONS[:3]):
        ids = torch.tensor([[*context, *found.token_ids]])
        # an additive mask that masks nothing
        everything = torch.zeros(1, 1, ids.shape[1], ids.shape[1])
        with torch.no_grad():
            states = model(ids, attention_mask=everything, output_hidden_states=True).hidden_states[
                -3
            ]
        assert relative(found.states, states[0, len(context) :]) < 1e-5


@pytest.mark.parametrize("kind", ["causal", "unmasked"])
def test_states_do_not_depend_on_neighbours_or_budget(
    kind: str, model_of: Callable[[str], Path], settings: Make
) -> None:
    encoder = PromptEncoder.load(
        resolve_encoder(settings(model_of("gemma3"), kind=kind), "cpu"), "cpu"
    )
    reference = encoder.encode(CAPTIONS)
    for captions, budget in [(CAPTIONS[::-1], 10_000), (CAPTIONS * 3, 64), (CAPTIONS, 1)]:
        found = {
            c: s.states for c, s in zip(captions, encoder.encode(captions, token_budget=budget))
        }
        for caption, expected in zip(CAPTIONS, reference):
            assert relative(found[caption], expected.states) < 1e-5


def test_an_instruction_changes_the_states(model_of: Callable[[str], Path], settings: Make) -> None:
    def states(instruction: str) -> torch.Tensor:
        spec = resolve_encoder(settings(model_of("llama"), instruction=instruction), "cpu")
        return PromptEncoder.load(spec, "cpu").encode(CAPTIONS[:1])[0].states

    assert relative(states("Describe the shape:"), states("Describe the color:")) > 1e-2


def test_blocks_behind_the_layer_and_the_head_are_not_loaded(
    model_of: Callable[[str], Path], settings: Make
) -> None:
    full = AutoModel.from_pretrained(model_of("llama"))
    per_block = sum(p.numel() for p in full.layers[0].parameters())
    whole = sum(p.numel() for p in full.parameters())
    encoder = PromptEncoder.load(resolve_encoder(settings(model_of("llama")), "cpu"), "cpu")
    assert encoder.trunk.parameters == whole - 2 * per_block
    vision = PromptEncoder.load(resolve_encoder(settings(model_of("llava")), "cpu"), "cpu")
    assert vision.trunk.parameters == encoder.trunk.parameters
    assert encoder.spec.total_blocks == LAYERS


def test_missing_tensors_are_refused_not_made_up(
    tmp_path: Path, model_of: Callable[[str], Path], settings: Make
) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(model_of("llama"), folder)
    break_weights(folder)
    with pytest.raises(InputError, match=r"lack 1 tensors.*layers\.0"):
        PromptEncoder.load(resolve_encoder(settings(folder), "cpu"), "cpu")


def test_no_caption_no_work(model_of: Callable[[str], Path], settings: Make) -> None:
    encoder = PromptEncoder.load(resolve_encoder(settings(model_of("llama")), "cpu"), "cpu")
    assert encoder.encode([]) == []
    ids, states = encoder.empty_states()
    assert states.shape == (len(ids), encoder.spec.width)
    assert len(ids) >= 1


def test_bfloat16_states_are_close_to_float32(
    model_of: Callable[[str], Path], settings: Make
) -> None:
    def states(dtype: str) -> torch.Tensor:
        spec = resolve_encoder(settings(model_of("llama"), dtype=dtype), "cpu")
        return PromptEncoder.load(spec, "cpu").encode(CAPTIONS[2:3])[0].states

    low = states("bfloat16")
    assert low.dtype == torch.bfloat16
    assert 0 < relative(low.float(), states("float32")) < 0.05


@pytest.mark.parametrize(
    ("family", "kind"), [("bert", "causal"), ("t5", "causal"), ("t5", "unmasked")]
)
def test_a_model_of_another_kind_is_refused(
    family: str, kind: str, model_of: Callable[[str], Path], settings: Make
) -> None:
    with pytest.raises(InputError, match="kind: encoder"):
        PromptEncoder.load(resolve_encoder(settings(model_of(family), kind=kind), "cpu"), "cpu")


def test_a_model_that_keeps_its_causal_mask_is_refused(
    model_of: Callable[[str], Path], settings: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a model does that never asks its config for the direction."""
    from transformers.models.llama import modeling_llama

    from lidit.text.trunk import Trunk

    monkeypatch.setattr(
        modeling_llama, "create_causal_mask", lambda **_: torch.ones(3, 3).tril().bool()[None, None]
    )
    with pytest.raises(InputError, match="keeps its causal mask"):
        Trunk.load(resolve_encoder(settings(model_of("llama"), kind="unmasked"), "cpu"), "cpu")


def live_bytes() -> int:
    """Bytes of all tensors alive, each storage once."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in found}.values())


@pytest.mark.parametrize("family", ["llama", pytest.param("gemma3", marks=pytest.mark.slow)])
def test_a_batch_leaves_nothing_behind(
    model_of: Callable[[str], Path], settings: Make, family: str
) -> None:
    """Not even for the garbage collector: keys and values of a few batches would fill a GPU before
    it comes.
    """
    encoder = PromptEncoder.load(resolve_encoder(settings(model_of(family)), "cpu"), "cpu")
    ids = [[5 + i % 40 for i in range(60)]] * 64
    batch = lambda: sum(flat.numel() for _, flat in encoder.encode_tokens(ids, 4096))  # noqa: E731
    batch()
    gc.collect()
    gc.disable()
    try:
        before = live_bytes()
        values = batch()
        left = live_bytes() - before
    finally:
        gc.enable()
    assert left < values * 4 / 20, (
        f"{left:,} bytes are left of a batch whose states take {values * 4:,}"
    )


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_moved_llm_leaves_nothing_behind(
    model_of: Callable[[str], Path], settings: Make, family: str
) -> None:
    """The context's keys and values go with the weights. "meta" is the one other device every
    machine has.
    """
    encoder = PromptEncoder.load(resolve_encoder(settings(model_of(family))))
    trunk = encoder.trunk
    encoder.to("meta")
    held = [*trunk.model.parameters(), *trunk.model.buffers()]
    held += [tensor for layer in trunk._context.layers for tensor in (layer.keys, layer.values)]
    assert {tensor.device.type for tensor in held} == {trunk.device.type} == {"meta"}
