"""Pooled vectors, and what was joined, in an export's Parquet files."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lidit.store import Corpus
from lidit.store.export import export_corpus
from lidit.store.parquet import ParquetLayout
from tests.helpers.corpus_factory import make_corpus
from tests.helpers.whole_model import CAPTIONS, Make, load
from tests.text.test_embedding import embed


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_pooled_vectors_are_exported(
    tmp_path: Path, model_of: Callable[[str], Path], settings: Make, dtype: str
) -> None:
    encoder = load(
        settings(
            model_of("clip_text"),
            kind="encoder",
            layers=[-1, -2],
            pooled="pooler_output",
            max_tokens=40,
        )
    )
    embed(make_corpus(tmp_path / "corpus", [CAPTIONS, []]), encoder)
    family = Corpus.open(tmp_path / "corpus").text_family("tiny")
    expected, empty = family.pooled(0), family.shared().empty_pooled
    assert expected is not None
    assert empty is not None
    kind = getattr(np, dtype)

    out = tmp_path / "out"
    export_corpus(str(tmp_path / "corpus"), str(out), ParquetLayout(dtype=dtype), ["tiny"])
    # the second unit has no caption, and the same columns
    for unit in ("00000", "00001"):
        found = pq.read_schema(out / f"{unit}.parquet").field("tiny_pooled").type
        assert found == pa.list_(pa.from_numpy_dtype(kind), len(empty))
    frame = pd.read_parquet(out)
    assert len(frame) == len(expected)
    np.testing.assert_array_equal(
        np.stack(frame["tiny_pooled"].to_list()), np.stack(expected).astype(kind)
    )

    (row,) = pq.read_table(tmp_path / "out.shared.parquet").to_pylist()
    np.testing.assert_array_equal(np.array(row["empty_pooled"], kind), empty.numpy().astype(kind))
    facts = json.loads(pq.read_schema(out / "00000.parquet").metadata[b"lidit"])["families"]["tiny"]
    assert facts["layers"] == row["layers"] == family.spec["layers"]
    assert facts["join"] == row["join"] == "concatenate"
    assert "revision" in facts
    assert row["revision"] is None
