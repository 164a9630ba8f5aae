"""Families that earlier code wrote keep their fingerprints, and the same settings give the same
states.
"""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lidit.config import EncoderSettings
from lidit.errors import InputError
from lidit.store import Corpus, FamilyWriter
from lidit.store.verify import verify_corpus
from lidit.text import PromptEncoder, resolve_encoder
from lidit.text.embedding import ensure_shared

FIXTURES = Path(__file__).parents[1] / "fixtures"
LLMS = FIXTURES / "first_release" / "llms"
SETTINGS = {
    "chat": {
        "model": str(LLMS / "llama"),
        "layer": -2,
        "chat_template": True,
        "system_prompt": "Be exact.",
        "max_tokens": 9,
        "storage": "float32",
    },
    "unmasked": {
        "model": str(LLMS / "qwen2"),
        "layer": -1,
        "kind": "unmasked",
        "instruction": "",
        "storage": "bfloat16",
    },
}
TOLERANCE = {"chat": 1e-5, "unmasked": 0.01}

Make = Callable[..., EncoderSettings]


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    """A copy to work in: nothing may change the original."""
    folder = tmp_path / "corpus"
    shutil.copytree(FIXTURES / "first_release" / "corpus", folder)
    shutil.rmtree(folder / "text")
    shutil.copytree(FIXTURES / "more_families", folder / "text")
    return Corpus.open(folder)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_family_keeps_fingerprint_tokens_and_states(name: str, corpus: Corpus) -> None:
    assert verify_corpus(corpus.folder.location, deep=True).problems == []
    family = corpus.text_family(name)
    spec = resolve_encoder(EncoderSettings.model_validate({"name": name, **SETTINGS[name]}), "cpu")
    assert spec.fingerprint == family.fingerprint
    assert spec.to_dict() == family.spec
    encoder, shared = PromptEncoder.load(spec, "cpu"), family.shared()
    ids, prefix = encoder.prefix_states()
    assert ids == shared.prefix_ids
    torch.testing.assert_close(prefix, shared.prefix, rtol=1e-4, atol=1e-5)
    for unit in range(corpus.num_units):
        found = encoder.encode(corpus.captions(unit)["text"].to_pylist())
        assert [list(row.token_ids) for row in found] == family.token_ids(unit)
        for stored, row in zip(family.read(unit), found, strict=True):
            error = (stored.float() - row.states).norm() / row.states.norm()
            assert error < TOLERANCE[name]


@pytest.mark.parametrize("name", SETTINGS)
def test_embedding_goes_on_where_earlier_code_stopped(name: str, corpus: Corpus) -> None:
    spec = resolve_encoder(EncoderSettings.model_validate({"name": name, **SETTINGS[name]}), "cpu")
    writer = FamilyWriter.open_or_create(corpus.folder.location, "text", name, spec.to_dict())
    assert writer.directory == corpus.text_family(name).folder.location.rsplit("/", 1)[-1]
    assert writer.complete()
    assert (
        ensure_shared(PromptEncoder.load(spec, "cpu"), writer).sha256
        == corpus.text_family(name).shared().sha256
    )


def test_a_family_behind_another_instruction_is_not_continued(
    corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a change of what renders chat templates: files and fingerprint are the same, the
    instruction is not.
    """
    spec = resolve_encoder(
        EncoderSettings.model_validate({"name": "chat", **SETTINGS["chat"]}), "cpu"
    )
    encoder = PromptEncoder.load(spec, "cpu")
    ids = encoder.tokenizer.prefix_ids
    writer = FamilyWriter.open_or_create(corpus.folder.location, "text", "chat", spec.to_dict())
    monkeypatch.setattr(encoder.tokenizer, "prefix_ids", (*ids[:-1], ids[-1] + 1))
    with pytest.raises(InputError, match="an instruction of other tokens"):
        ensure_shared(encoder, writer)
