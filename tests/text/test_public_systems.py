"""Encoders of public systems give the states of those systems' own pipelines, stored
and read back.
"""

from pathlib import Path

import pytest
import torch

from lidit.config.shipped import ENCODERS, load_encoder_settings
from lidit.store import Corpus, TextFamily
from lidit.text import PromptEncoder, resolve_encoder
from tests.helpers import public_models as tiny
from tests.helpers.corpus_factory import make_corpus
from tests.helpers.public_pipelines import Answer, bare, ideogram4
from tests.helpers.public_systems import SYSTEMS, System
from tests.text.test_embedding import embed

TOLERANCE = 1e-5


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert found.shape == expected.shape
    return float(
        (found.float() - expected.float()).norm() / expected.float().norm().clamp(min=1e-12)
    )


def same(found: Answer, expected: Answer) -> None:
    """Every argument equal; what a mask hides may be anything."""
    assert set(found) == set(expected)
    mask_name = next((name for name in expected if "mask" in name), None)
    hidden = (
        None if mask_name is None or expected[mask_name] is None else expected[mask_name].bool()
    )
    for name, theirs in expected.items():
        ours = found[name]
        if name == mask_name:
            assert (ours is None) == (theirs is None)
            assert ours is None or (torch.equal(ours, theirs) and ours.dtype == theirs.dtype)
        elif isinstance(theirs, list):
            assert len(ours) == len(theirs)
            assert max(relative(a, b) for a, b in zip(ours, theirs)) < TOLERANCE
        elif hidden is not None and theirs.ndim > 2:
            if theirs.shape[1] != hidden.shape[1]:  # bundles stand before tokens
                ours, theirs = ours.movedim(1, 2), theirs.movedim(1, 2)
            assert relative(ours[hidden], theirs[hidden]) < TOLERANCE
        else:
            assert relative(ours, theirs) < TOLERANCE


def answer_of(
    family: TextFamily, system: System, expected: Answer, rows: list[int] | None, empty: bool
) -> Answer:
    """What is stored, under the names of the pipeline's answer."""
    if family.manifest["extra"]["encoder"]["condition"] is not None:
        if not empty:
            return family.prompt_embeds(0, rows, system.padded)
        negative = family.negative_prompt_embeds(padded=system.padded)
        return {name.removeprefix("negative_"): value for name, value in negative.items()}
    shared = family.shared()
    states = [shared.empty] if empty else family.read(0, rows)
    pooled = [shared.empty_pooled] if empty else family.pooled(0, rows)
    found: Answer = {}
    for name, theirs in expected.items():
        if name == "mask":
            counts = torch.tensor([len(row) for row in states])  # of what is stored
            found[name] = (torch.arange(theirs.shape[1]) < counts[:, None]).to(theirs.dtype)
        elif name == "pooled":
            found[name] = torch.stack(pooled)
        else:
            left = system.ask is ideogram4
            full = [
                torch.cat([shared.prefix if left else shared.prefix[:0], row]) for row in states
            ]
            places = [
                (theirs.shape[1] - len(row), 0) if left else (0, theirs.shape[1] - len(row))
                for row in full
            ]
            rows_ = [
                torch.nn.functional.pad(row, (0, 0, *place)) for row, place in zip(full, places)
            ]
            found[name] = torch.stack(rows_).view(theirs.shape)
    return found


QUICK = {"qwen-image", "flux2-klein", "clip-l", "sana"}


@pytest.mark.parametrize(
    "name",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in SYSTEMS],
)
@torch.no_grad()
def test_stored_states_are_what_the_pipeline_computes(name: str, tmp_path: Path) -> None:
    system = SYSTEMS[name]
    model, tokens = system.build()
    folder = tiny.saved(tmp_path / "model", model, tokens)
    settings = load_encoder_settings(name, [f"model={folder}", "dtype=float32", "storage=float32"])
    settings = settings.model_copy(update=system.changes)
    encoder = PromptEncoder.load(resolve_encoder(settings, "cpu"), "cpu")
    captions = list(system.captions)
    embed(
        make_corpus(tmp_path / "corpus", [captions]),
        encoder,
        {"encoder": settings.model_dump(mode="json")},
    )
    family = Corpus.open(tmp_path / "corpus").text_family(name)
    for rows in (
        [[row] for row in range(len(captions))]
        if system.one_by_one
        else [list(range(len(captions)))]
    ):
        expected = system.ask(model, tokens, encoder, [captions[row] for row in rows])
        same(answer_of(family, system, expected, rows, empty=False), expected)
    expected = system.ask(model, tokens, encoder, [""])
    same(answer_of(family, system, expected, None, empty=True), expected)


@pytest.mark.slow
@torch.no_grad()
def test_latte_fills_several_prompts_up_and_its_negative_prompt_with_padding(
    tmp_path: Path,
) -> None:
    model, tokens = SYSTEMS["latte"].build()
    folder = tiny.saved(tmp_path / "model", model, tokens)
    settings = load_encoder_settings("latte", [f"model={folder}", "storage=float32"])
    encoder = PromptEncoder.load(resolve_encoder(settings, "cpu"), "cpu")
    captions = list(SYSTEMS["latte"].captions)
    corpus = make_corpus(tmp_path / "corpus", [captions])
    embed(corpus, encoder, {"encoder": settings.model_dump(mode="json")})
    pipe = bare("LattePipeline", text_encoder=model, tokenizer=tokens)
    states, negative = pipe.encode_prompt(captions, device="cpu")
    family = Corpus.open(tmp_path / "corpus").text_family("latte")
    same(family.prompt_embeds(0, padded=120), {"prompt_embeds": states})
    # what stands beside the prompt is the empty text's padding too, as the documentation says
    changes = ["name=negative", "padding={masked: true}"]
    padded = load_encoder_settings("latte", [f"model={folder}", "storage=float32", *changes])
    empty = PromptEncoder.load(resolve_encoder(padded, "cpu"), "cpu").encode([""])[0].states
    assert relative(empty.expand_as(negative), negative) < TOLERANCE
    assert (
        relative(family.negative_prompt_embeds(padded=120)["negative_prompt_embeds"][0], empty)
        > 0.1
    )


def test_every_public_encoder_is_compared() -> None:
    shipped = {path.stem for path in ENCODERS.glob("*.yaml")}
    own = {"smollm2", "gemma3", "lidit-llama3", "lidit-qwen1.5"}
    assert shipped - set(SYSTEMS) == own
    assert set(SYSTEMS) <= shipped
