"""The plan's formulas against what small real models, encoders and files measure."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lidit.config import EncoderSettings, Recipe
from lidit.config.shipped import load_recipe
from lidit.data.order import Order, shares
from lidit.errors import InputError, StorageError
from lidit.models import LIDiT, TextStates
from lidit.plan.facts import encoder_shape, gather_facts
from lidit.plan.memory import (
    REDUCE_BUCKET,
    activation_bytes,
    buffer_bytes,
    checkpointing_that_fits,
    saved_bytes,
    state_bytes,
)
from lidit.plan.plan import (
    embedding_flops,
    latent_bytes,
    make_plan,
    opened_share,
    step_flops,
)
from lidit.plan.states import rolling_passes, text_bytes, windows_ahead
from lidit.plan.subject import Facts, PlannedEncoder
from lidit.store import channel_statistics, latents_table, text_table
from lidit.store.files.atomic import arrow_writer
from lidit.store.files.folder import Folder
from lidit.store.latent_file import Crop
from lidit.text import PromptEncoder, resolve_encoder
from tests.helpers.command import lidit
from tests.helpers.tiny_models import tiny_llm
from tests.helpers.trained import SmallWorld

WIDTHS = {"llama": 64, "qwen2": 48}


def recipe_of(small_world: SmallWorld, **changes: object) -> Recipe:
    return small_world.recipe(Path("nowhere"), **changes)  # type: ignore[arg-type]


def real_inputs(
    batch: int, tokens: int, prefix: int
) -> tuple[torch.Tensor, torch.Tensor, dict[str, TextStates]]:
    text = {
        name: TextStates(
            torch.randn(batch, tokens, width),
            torch.ones(batch, tokens, dtype=torch.bool),
            torch.randn(prefix, width),
        )
        for name, width in WIDTHS.items()
    }
    return torch.randn(batch, 3, 32, 32), torch.rand(batch), text


def facts_of(small_world: SmallWorld, tokens: int, prefix: int) -> Facts:
    found = gather_facts(recipe_of(small_world))
    return Facts(
        samples=found.samples,
        captions=found.captions,
        caption_tokens=dict.fromkeys(WIDTHS, float(tokens)),
        prefix_tokens=dict.fromkeys(WIDTHS, prefix),
        encoders=found.encoders,
        latent=found.latent,
        latent_storage="uint8",
        posterior=False,
    )


def test_flops_are_what_torch_counts_of_a_training_step(small_world: SmallWorld) -> None:
    batch, tokens, prefix = 6, 20, 9
    recipe = recipe_of(small_world, model={"width": 64, "depth": 3})
    model = LIDiT.from_settings(recipe.model, WIDTHS, 3)
    # The counter does not know the CPU's fused attention: the plain one is two matrix products it
    # can see.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(*real_inputs(batch, tokens, prefix)).square().mean().backward()
    assert step_flops(model, facts_of(small_world, tokens, prefix), batch) == pytest.approx(
        counter.get_total_flops(), rel=0.05
    )


@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_are_what_a_forward_pass_keeps(
    small_world: SmallWorld, checkpointing: bool
) -> None:
    batch, tokens, prefix = 6, 20, 9
    recipe = recipe_of(
        small_world, model={"width": 64, "depth": 3, "activation_checkpointing": checkpointing}
    )
    model = LIDiT.from_settings(recipe.model, WIDTHS, 3).train()
    kept = saved_bytes(model, *real_inputs(batch, tokens, prefix))
    expected = activation_bytes(recipe, facts_of(small_world, tokens, prefix), batch)
    if checkpointing:  # and, while a block is computed again, what that block keeps
        plain = recipe_of(small_world, model={"width": 64, "depth": 3})
        whole = saved_bytes(
            LIDiT.from_settings(plain.model, WIDTHS, 3).train(), *real_inputs(batch, tokens, prefix)
        )
        assert kept < whole
        kept += whole // 3
    assert expected == pytest.approx(kept, rel=0.15)


@pytest.mark.parametrize("every", [4, 2, 1])
def test_no_more_blocks_are_computed_again_than_memory_asks_for(
    small_world: SmallWorld, every: int
) -> None:
    facts, shape = facts_of(small_world, 20, 9), {"width": 64, "depth": 8}
    model = {**shape, "activation_checkpointing": True, "checkpointed_every": every}
    needed = activation_bytes(recipe_of(small_world, model=model), facts, 6)
    recipe = recipe_of(small_world, model=shape)
    assert checkpointing_that_fits(recipe, facts, 6, 1.05 * needed) == every
    assert checkpointing_that_fits(recipe, facts, 6, activation_bytes(recipe, facts, 6)) == 0
    assert checkpointing_that_fits(recipe, facts, 6, 0.0) is None


@pytest.mark.parametrize("nodes", [1, 2, 8])
def test_a_node_opens_the_units_that_its_part_of_the_batches_needs(
    small_world: SmallWorld, nodes: int
) -> None:
    recipe = recipe_of(small_world, data={"window_units": 32, "sort_by_unit": True})
    order = Order(np.full((64, 1), 256), lambda unit: np.zeros(256, np.int64), 1024, 0, 32, True)
    opened = [
        {
            int(unit)
            for step in range(8)
            for unit in order.batch(step).slice(part.start, part.stop).unit
        }
        for part in shares(1024, nodes)
    ]
    mean = sum(map(len, opened)) / nodes / 32
    assert opened_share(recipe, nodes) == pytest.approx(mean, rel=0.15)
    drawn = recipe_of(small_world, data={"window_units": 32})
    assert opened_share(drawn, nodes) == 1


def test_gradients_of_several_parts_and_overlapping_sums_take_memory() -> None:
    count = 10**9
    parts = [state_bytes(count, 2, 8, "bfloat16", accumulated) for accumulated in (False, True)]
    assert parts[1] - parts[0] == 2 * count / 8
    buffers = [buffer_bytes(count, 2, "bfloat16", overlapping) for overlapping in (False, True)]
    assert buffers == [2 * REDUCE_BUCKET, 4 * REDUCE_BUCKET]


@pytest.mark.parametrize("storage", ["float32", "bfloat16", "int8"])
def test_text_bytes_are_those_of_written_files(tmp_path: Path, storage: str) -> None:
    width, lengths = 96, [1 + (7 * i) % 40 for i in range(400)]
    states = [torch.randn(length, width) for length in lengths]
    table = text_table(
        [[0] * n for n in lengths], states, storage, None, *channel_statistics(states)
    )
    with (tmp_path / "unit").open("wb") as file:
        arrow_writer([table])(file)
    expected = text_bytes(len(lengths), sum(lengths) / len(lengths), width, storage)
    assert expected == pytest.approx((tmp_path / "unit").stat().st_size, rel=0.02)


@pytest.mark.parametrize(
    ("storage", "posterior"), [("float32", True), ("bfloat16", False), ("uint8", False)]
)
def test_latent_bytes_are_those_of_written_files(
    tmp_path: Path, storage: str, posterior: bool
) -> None:
    latents = [torch.rand(4, 8, 8) for _ in range(1500)]
    table = latents_table(
        latents, [Crop(0, 0, 64, 64)] * 1500, storage, latents if posterior else None
    )
    with (tmp_path / "unit").open("wb") as file:
        arrow_writer([table])(file)
    assert latent_bytes(1500, (4, 8, 8), storage, posterior) == pytest.approx(
        (tmp_path / "unit").stat().st_size, rel=0.02
    )


def test_embedding_flops_are_those_of_the_encoder(tmp_path: Path) -> None:
    settings = EncoderSettings(
        name="llama", model=str(tiny_llm(tmp_path / "llama", "llama", width=256))
    )
    encoder = PromptEncoder.load(resolve_encoder(settings))
    captions = ["a red circle on the left of a blue square"] * 8
    prefix = len(encoder.prefix_states()[0])
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        tokens = sum(len(caption.token_ids) for caption in encoder.encode(captions))
    shape = encoder_shape(settings, Recipe(name="x", corpus="x", encoders=(settings,)))
    assert shape.width == 256
    expected = embedding_flops(
        PlannedEncoder(shape, encoder.spec.blocks, shape.width), tokens, prefix, tokens / 8
    )
    assert expected == pytest.approx(counter.get_total_flops(), rel=0.1)


@pytest.mark.parametrize("layers", ["mean", "learned", "per_block"])
def test_flops_and_activations_of_a_model_that_reads_several_layers(layers: str) -> None:
    batch, tokens, prefix, shape = 6, 20, 9, {"width": 256, "blocks": 6, "block_parameters": 1000}
    recipe = Recipe.model_validate(
        {"name": "x", "corpus": "nowhere", "encoders": [{"name": "llm", "model": "nowhere",
                                                         "layers": [2, 4, 6],
         "join": "separate"}], "plan": {"samples": 8, "encoders": {"llm": shape},
                                        "caption_tokens": tokens,
         "prefix_tokens": prefix}, "ingest": {"resolution": 32},
         "model": {"width": 64, "depth": 3, "patch_size": 8, "layers": layers}}
    )  # fmt: skip
    facts = gather_facts(recipe)
    assert (
        facts.encoders["llm"].width,
        facts.encoders["llm"].layers,
        facts.encoders["llm"].blocks,
    ) == (768, 3, 6)
    model = LIDiT.from_settings(recipe.model, {"llm": 768}, 3, {"llm": 3}).train()
    mask = torch.ones(batch, tokens, dtype=torch.bool)
    text = {"llm": TextStates(torch.randn(batch, tokens, 768), mask, torch.randn(prefix, 768))}
    inputs = (torch.randn(batch, 3, 32, 32), torch.rand(batch), text)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(*inputs).square().mean().backward()
    assert step_flops(model, facts, batch) == pytest.approx(counter.get_total_flops(), rel=0.05)
    assert activation_bytes(recipe, facts, batch) == pytest.approx(
        saved_bytes(model, *inputs), rel=0.15
    )


def test_a_plan_of_several_layers_padding_and_pooled_vectors() -> None:
    shape = {"width": 64, "blocks": 8, "block_parameters": 1000}

    def facts(**changes: object) -> Facts:
        encoder = {"name": "llm", "model": "nowhere", "max_tokens": 100, **changes}
        plan = {"samples": 8, "encoders": {"llm": shape}, "caption_tokens": 30, "prefix_tokens": 12}
        tree = {"name": "x", "corpus": "nowhere", "encoders": [encoder], "plan": plan}
        return gather_facts(Recipe.model_validate(tree))

    several = facts(layers=[2, -3, 4])
    assert (several.encoders["llm"].width, several.encoders["llm"].blocks) == (3 * 64, 6)
    assert several.encoders["llm"].layers == 1  # side by side
    assert facts(layers="all", join="mean", normalise="rms").encoders["llm"].width == 64
    one = facts(layer=6)
    needed = [embedding_flops(f.encoders["llm"], 300, 12, 30) for f in (one, several)]
    assert needed[0] == needed[1] > 0
    assert facts(padding={}).caption_tokens == {"llm": 100}
    assert facts(padding={"multiple_of": 16}).caption_tokens == {"llm": 32}
    assert facts(padding={}, template="see {}", counted="whole").caption_tokens == {"llm": 88}
    vectors = facts(kind="encoder", layer=-1, pooled="pooler_output")
    assert vectors.encoders["llm"].pooled == 64
    with pytest.raises(InputError, match="encoder llm: layer 9: nowhere has 8 blocks"):
        facts(layers=[2, 9])


def test_a_corpus_that_is_there_is_measured(small_world: SmallWorld) -> None:
    corpus = small_world.open()
    recipe = recipe_of(small_world)
    facts, plan = gather_facts(recipe), make_plan(recipe, gather_facts(recipe))
    assert (facts.samples, facts.latent) == (97, (3, 32, 32))
    for name, storage in (("llama", "bfloat16"), ("qwen2", "int8")):
        family = corpus.text_family(name)
        assert facts.captions * facts.caption_tokens[name] == pytest.approx(
            family.manifest["tokens"], rel=1e-6
        )
        assert facts.prefix_tokens[name] == len(family.shared().prefix)
        assert facts.encoders[name].width == family.width
        # files of twenty rows are half headers
        assert plan.text_bytes[name][storage] < family.manifest["bytes"]
    assert plan.epochs == pytest.approx(8 * 12 / 97)


@pytest.mark.parametrize(
    ("name", "billions", "steps"), [("lidit-1b", 1, 500_000), ("lidit-10b", 10, 1_000_000)]
)
def test_the_papers_runs(
    name: str, billions: int, steps: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert lidit("plan", name, "--json") == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["parameters"] == pytest.approx(billions * 1e9, rel=0.1)
    assert plan["steps"] == steps
    recipe = load_recipe(name)
    images, tokens = recipe.train.batch_size * steps, (recipe.plan.latent[1] // 2) ** 2  # type: ignore[index]
    # 6 FLOPs per token and parameter that sees every image token: 14 of a block's 25 D^2; attention
    # left out
    assert plan["train_gpu_hours"] == pytest.approx(
        6 * 14 / 25 * plan["parameters"] * tokens * images / (989e12 * 0.4 * 3600), rel=0.2
    )


def test_what_it_shows(capsys: pytest.CaptureFixture[str]) -> None:
    assert lidit("plan", "lidit-1b", "plan.gpus=8", "engine.workers=8") == 0
    shown = capsys.readouterr().out
    for word in ("ZeRO stage", "2 (recipe)", "GPU-hours", "MB/s per node", "8 bits", "cost"):
        assert word in shown, word


def test_unknown_sizes_are_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write: Callable[[str], int] = (tmp_path / "r.yaml").write_text
    write("name: r\ncorpus: nowhere\nencoders: [{name: big, model: models/big}]\n")
    assert lidit("plan", tmp_path / "r.yaml") == 2
    told = capsys.readouterr().err
    assert (
        f"error: {tmp_path}/r.yaml: the corpus nowhere does not exist yet; give "
        "plan.samples=NUMBER" in told
    )
    assert lidit("plan", tmp_path / "r.yaml", "plan.samples=1000") == 2
    assert f"error: {tmp_path}/r.yaml: plan.encoders.big" in capsys.readouterr().err


def test_a_corpus_that_cannot_be_looked_at_is_not_called_absent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "corpus.json").write_text("{")
    assert lidit("plan", "lidit-1b", f"corpus={tmp_path / 'damaged'}") == 2
    assert "damaged/corpus.json: damaged" in capsys.readouterr().err

    def refused(*_: object) -> bool:
        raise StorageError("s3://bucket/corpus: no credentials")

    monkeypatch.setattr(Folder, "exists", refused)
    # its samples are assumed
    assert lidit("plan", "lidit-1b", "corpus=s3://bucket/corpus", "--json") == 0
    capsys.readouterr()
    assert lidit("plan", "lidit-1b", "corpus=s3://bucket/corpus", "plan.samples=null") == 2
    assert "error: s3://bucket/corpus: no credentials" in capsys.readouterr().err


# -- store, code or roll ---------------------------------------------------------------------------

PAPERS_LLMS = {
    "llama3": {"width": 4096, "blocks": 32, "block_parameters": 218_112_000},
    "qwen": {"width": 4096, "blocks": 32, "block_parameters": 202_387_456},
}


def papers_recipe(name: str, pixels: int, samples: int, steps: int, **plan: object) -> Recipe:
    """A preset at `pixels`, with the paper's two LLMs and 100 tokens a caption."""
    side = pixels // 8
    return Recipe.model_validate(
        {
            "name": "paper",
            "corpus": "nowhere",
            "encoders": [{"name": encoder, "model": f"models/{encoder}",
                          "storage": "int8"} for encoder in PAPERS_LLMS],
            "codec": {"name": "sdxl", "model": "models/sdxl", "posterior": "mean"},
            "model": {"preset": name},
            "train": {"batch_size": 4096, "steps": steps},
            "plan": {"samples": samples, "caption_tokens": 100, "prefix_tokens": 40,
                     "latent": [4, side, side],
                     "encoders": PAPERS_LLMS, **plan},
        }
    )  # fmt: skip


@pytest.mark.parametrize(
    ("preset", "pixels", "encoders"),
    [("1B", 256, 2.4), ("1B", 512, 0.63), ("10B", 256, 0.25), ("10B", 512, 0.07)],
)
def test_how_many_encoders_the_papers_models_need(
    preset: str, pixels: int, encoders: float
) -> None:
    recipe = papers_recipe(preset, pixels, 10**9, 250_000)
    assert make_plan(recipe, gather_facts(recipe)).states.encoders_per_trainer == pytest.approx(
        encoders, rel=0.12
    )


def test_what_is_cheapest_follows_from_passes_and_sizes() -> None:
    once = papers_recipe("10B", 512, 10**9, 250_000)
    rolled = make_plan(once, gather_facts(once)).states
    assert rolled.terabytes["int8"] == pytest.approx(821, rel=0.01)
    assert rolled.terabytes["coded"] == pytest.approx(821 * 3.2 / 8, rel=0.01)
    assert rolled.monthly["int8"] == pytest.approx(16_400, rel=0.01)
    assert rolled.passes == pytest.approx(1.024)
    # A second pass costs another encoding; the family itself is a few windows.
    assert rolled.roll_total == pytest.approx(4_430 * 1.024, rel=0.1)
    assert rolled.way == "roll"
    assert rolled.advice.startswith("roll: ")

    many = papers_recipe("1B", 256, 60_000_000, 250_000)
    assert make_plan(many, gather_facts(many)).states.way == "code"
    # Where storage is nearly free, bits save nothing that is worth a step.
    cheap = papers_recipe("1B", 256, 60_000_000, 250_000, price_per_terabyte_month=1)
    assert make_plan(cheap, gather_facts(cheap)).states.way == "store"


def test_a_kept_share_is_encoded_once() -> None:
    assert rolling_passes(5.0, 0.0) == 5.0
    assert rolling_passes(5.0, 0.4) == pytest.approx(0.4 + 0.6 * 5)
    assert rolling_passes(5.0, 1.0) == 1.0
    assert rolling_passes(0.5, 1.0) == 0.5


def test_encoders_are_as_far_ahead_as_a_unit_takes() -> None:
    assert windows_ahead(6.0, 3.0) == 4
    assert windows_ahead(6.1, 3.0) == 5
    # 512 H100: a window of 16 units takes 3 s, one encoder 6.7 s for a unit.
    recipe = papers_recipe("10B", 512, 10**9, 250_000, gpus=512)
    assert make_plan(recipe, gather_facts(recipe)).states.ahead == 5


def test_a_node_reads_what_its_samples_need() -> None:
    recipe = papers_recipe("10B", 512, 10**9, 250_000, gpus=512)
    plan = make_plan(recipe, gather_facts(recipe))
    # Behind a URL states come by rows, latents by units that every node opens.
    batch = recipe.train.batch_size / plan.seconds_per_step
    latents = plan.latent_bytes / 10**9 * batch
    assert plan.fetched_bytes_per_second_per_node == pytest.approx(
        plan.read_bytes_per_second_per_node + (1 - 1 / 64) * latents
    )
    states = plan.states
    assert states.gigabytes_per_second["bfloat16"] == pytest.approx(8 * 0.017, rel=0.1)
    assert states.gigabytes_per_second["coded"] == pytest.approx(8 * 0.017 * 3.2 / 16, rel=0.1)
