"""A text family made without a cluster: every encoder kind, in pieces, with one calibration sample
for all encoders.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lidit.config import EncoderSettings
from lidit.store import Corpus, FamilyWriter, UnitStatistics
from lidit.text import PromptEncoder, embedding, resolve_encoder
from lidit.text.embedding import calibration_captions, encoded_tables, ensure_shared
from tests.helpers.corpus_factory import WORDS, make_corpus

Make = Callable[..., EncoderSettings]
UNITS = [WORDS, (), ("one", "two and three " * 9)]


def embed(
    corpus: Corpus, encoder: PromptEncoder, extra: dict[str, Any] | None = None
) -> FamilyWriter:
    spec = encoder.spec
    writer = FamilyWriter.open_or_create(corpus.folder.location, "text", spec.name, spec.to_dict())
    shared = ensure_shared(encoder, writer)
    for unit in writer.pending():
        tokens = encoder.tokenizer.tokenize(corpus.captions(unit)["text"].to_pylist())
        statistics = UnitStatistics()
        writer.publish(
            unit, encoded_tables(encoder, shared, tokens, statistics), statistics=statistics
        )
    writer.finish(extra)
    return writer


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("llama", {}),
        ("llama", {"instruction": ""}),
        ("llama", {"kind": "unmasked"}),
        ("llama", {"dtype": "bfloat16", "storage": "compute"}),
        ("t5", {"kind": "encoder", "layer": -1}),
    ],
)
def test_what_is_stored_is_what_was_computed(
    name: str,
    changes: dict[str, object],
    tmp_path: Path,
    model_of: Callable[[str], Path],
    settings: Make,
) -> None:
    corpus = make_corpus(tmp_path, UNITS)
    wanted = settings(model_of(name), **({"storage": "float32"} | changes))
    encoder = PromptEncoder.load(resolve_encoder(wanted, "cpu"), "cpu")
    embed(corpus, encoder)
    stored = Corpus.open(tmp_path).text_family("tiny")
    shares_prefix = wanted.kind == "causal" and wanted.instruction is None
    assert (len(stored.shared().prefix) > 0) == shares_prefix
    assert len(stored.shared().empty) >= 1
    for unit in range(corpus.num_units):
        expected = encoder.encode(corpus.captions(unit)["text"].to_pylist())
        for states, caption in zip(stored.read(unit), expected, strict=True):
            assert states.dtype == caption.states.dtype
            assert torch.equal(states, caption.states)
    assert stored.manifest["counts"]["computed_tokens"] >= stored.manifest["tokens"] > 0


def test_a_large_unit_is_written_in_pieces_with_the_same_values(
    tmp_path: Path, model_of: Callable[[str], Path], settings: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = PromptEncoder.load(
        resolve_encoder(settings(model_of("llama"), storage="float32"), "cpu"), "cpu"
    )
    whole = embed(make_corpus(tmp_path / "whole", UNITS), encoder)
    monkeypatch.setattr(embedding, "PIECE_BYTES", 20 * encoder.spec.width * 4)  # 20 tokens
    pieces = embed(make_corpus(tmp_path / "pieces", UNITS), encoder)
    one, other = (Corpus.open(tmp_path / name).text_family("tiny") for name in ("whole", "pieces"))
    file = pieces.folder.read_table(pieces.committed(0).file)
    assert (
        file["states"].num_chunks
        > whole.folder.read_table(whole.committed(0).file)["states"].num_chunks
        == 1
    )
    for unit in range(len(UNITS)):
        for a, b in zip(one.read(unit), other.read(unit), strict=True):
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)
        assert one.token_ids(unit) == other.token_ids(unit)


def test_the_calibration_sample_is_spread_over_the_corpus(tmp_path: Path) -> None:
    units = [[f"{unit}-{row}" for row in range(40)] for unit in range(100)]
    units[50] = []
    corpus = make_corpus(tmp_path, units)
    sample = calibration_captions(corpus)
    assert len(sample) == len(set(sample)) == embedding.CALIBRATION_CAPTIONS
    found = {int(caption.split("-")[0]) for caption in sample}
    assert len(found) == embedding.CALIBRATION_UNITS
    assert min(found) == 0
    assert max(found) >= 97
    assert sample == calibration_captions(Corpus.open(tmp_path))


def test_a_corpus_without_captions_is_embedded_too(
    tmp_path: Path, model_of: Callable[[str], Path], settings: Make
) -> None:
    corpus = make_corpus(tmp_path, [(), ()])
    encoder = PromptEncoder.load(resolve_encoder(settings(model_of("llama")), "cpu"), "cpu")
    embed(corpus, encoder)
    assert Corpus.open(tmp_path).text_family("tiny").read(1) == []
