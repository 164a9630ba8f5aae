"""An export's Parquet files in the hands of others: each reader gives [tokens, width] without our
code.
"""

import json
from pathlib import Path

import datasets
import duckdb
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from lidit.errors import InputError
from lidit.store import FamilyWriter, UnitStatistics, text_table
from lidit.store.export import export_corpus, export_states
from lidit.store.parquet import ParquetLayout
from tests.helpers import family_job
from tests.helpers.corpus_factory import WORDS, make_corpus
from tests.helpers.family_job import WIDTH

UNITS = [WORDS, ("one", "two", "one")]
CAPTIONS = [caption for unit in UNITS for caption in unit]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("corpus")
    make_corpus(folder, UNITS)
    family_job.run(str(folder), "bfloat16")
    return str(folder)


@pytest.fixture(scope="module", params=["float32", "float16"])
def exported(
    request: pytest.FixtureRequest, corpus: str, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    out = tmp_path_factory.mktemp("export") / request.param
    export_corpus(corpus, str(out), ParquetLayout(dtype=request.param), ["fake"])
    return out


def expected(caption: str, dtype: str) -> np.ndarray:
    """[T, W] as the corpus holds them, in the export's dtype and then float32."""
    states = family_job.states_of(caption)[1].bfloat16().to(getattr(torch, dtype))
    return np.asarray(states.float().numpy())


def check(captions: list[str], states: list[object], dtype: str) -> None:
    assert sorted(captions) == sorted(CAPTIONS)
    for caption, found in zip(captions, states, strict=True):
        array = np.array([np.asarray(row, dtype=np.float32) for row in found], np.float32).reshape(
            -1, WIDTH
        )  # type: ignore[attr-defined]
        np.testing.assert_array_equal(array, expected(caption, dtype))


def test_pyarrow_and_pandas(exported: Path) -> None:
    table = pq.read_table(exported)
    kind = pa.float16() if exported.name == "float16" else pa.float32()
    assert table.schema.field("fake_states").type == pa.list_(pa.list_(kind, WIDTH))
    check(table["caption"].to_pylist(), table["fake_states"].to_pylist(), exported.name)
    frame = pd.read_parquet(exported)
    check(list(frame["caption"]), list(frame["fake_states"]), exported.name)
    assert [list(ids) for ids in frame["fake_token_ids"]] == [
        [ord(c) for c in caption] for caption in CAPTIONS
    ]
    assert list(frame["fake_tokens"]) == [len(caption) for caption in CAPTIONS]


def test_polars_reads_the_folder(exported: Path) -> None:
    frame = pl.read_parquet(f"{exported}/")
    assert isinstance(frame.schema["fake_states"], pl.List)
    assert frame.schema["fake_states"].inner.shape == (WIDTH,)  # type: ignore[union-attr]
    check(frame["caption"].to_list(), frame["fake_states"].to_list(), exported.name)


def test_duckdb(exported: Path) -> None:
    rows = duckdb.sql(
        f"select caption, fake_states from read_parquet('{exported}/*.parquet')"
    ).fetchall()
    check([row[0] for row in rows], [row[1] for row in rows], exported.name)
    ((longest,),) = duckdb.sql(
        f"select max(len(fake_states)) from read_parquet('{exported}/*.parquet') where "
        f"len(fake_states[1]) = {WIDTH}"
    ).fetchall()
    assert longest == max(map(len, CAPTIONS))


def test_hugging_face_datasets(exported: Path, tmp_path: Path) -> None:
    rows = datasets.load_dataset(
        "parquet", data_dir=str(exported), split="train", cache_dir=str(tmp_path)
    )
    check(list(rows["caption"]), list(rows["fake_states"]), exported.name)
    with_numpy = rows.with_format("numpy")
    place = rows["caption"].index("two")
    assert np.asarray(with_numpy[place]["fake_states"]).shape == (3, WIDTH)


def test_the_shared_states_lie_beside_the_folder(exported: Path) -> None:
    assert {path.suffix for path in exported.iterdir()} == {".parquet"}
    (row,) = pq.read_table(exported.with_name(f"{exported.name}.shared.parquet")).to_pylist()
    dtype = exported.name
    for role, caption in (("prefix", "describe:"), ("empty", ".")):
        ids, _ = family_job.states_of(caption)
        assert row[f"{role}_token_ids"] == ([46] if role == "empty" else list(range(len(ids))))
        states = family_job.states_of(caption)[1].to(getattr(torch, dtype)).float().numpy()
        np.testing.assert_array_equal(np.array(row[f"{role}_states"], np.float32), states)
    assert (row["family"], row["width"], len(row["mean"]), len(row["deviation"])) == (
        "fake",
        WIDTH,
        WIDTH,
        WIDTH,
    )
    inside = json.loads(pq.read_schema(exported / "00000.parquet").metadata[b"lidit"])
    assert inside["families"]["fake"]["fingerprint"] == row["fingerprint"]
    assert (inside["dtype"], inside["rows"]) == (dtype, "samples")


def test_one_row_per_caption(corpus: str, tmp_path: Path) -> None:
    layout = ParquetLayout(rows="captions")
    export_corpus(corpus, str(tmp_path / "out"), layout, ["fake"])
    rows = pq.read_table(tmp_path / "out" / "00001.parquet").to_pylist()
    assert [(row["caption"], row["keys"]) for row in rows] == [
        ("one", ["1-0", "1-2"]),
        ("two", ["1-1"]),
    ]
    with pytest.raises(InputError, match="images belong to samples"):
        export_corpus(corpus, str(tmp_path / "images"), layout, ["fake"], lambda corpus, unit: [])
    with pytest.raises(InputError, match=r'holds another export .*rows: "captions" -> "samples"'):
        export_corpus(corpus, str(tmp_path / "out"), "parquet", ["fake"])


def test_one_file_of_all_units(corpus: str, tmp_path: Path) -> None:
    file = tmp_path / "new" / "states.parquet"
    assert export_states(corpus, file, "fake", ParquetLayout()) == len(CAPTIONS)
    frame = pd.read_parquet(file)
    check(list(frame["caption"]), list(frame["fake_states"]), "float32")
    assert {path.name for path in file.parent.iterdir()} == {
        "states.parquet",
        "states.shared.parquet",
    }


def test_values_beyond_float16_are_refused(tmp_path: Path) -> None:
    make_corpus(tmp_path / "corpus", [("one",)])
    writer = FamilyWriter.open_or_create(
        str(tmp_path / "corpus"), "text", "wide", {"storage": "float32"}
    )
    writer.write_shared(family_job.shared())
    statistics, states = UnitStatistics(), [torch.full((3, WIDTH), 7e4)]
    table = text_table([[1, 2, 3]], states, "float32", WIDTH)
    common = writer.shared()
    assert common is not None
    statistics.add(states, table, common.mean, common.deviation)
    writer.publish(0, table, statistics=statistics)
    writer.finish()
    with pytest.raises(InputError, match=r"beyond float16's largest value .*export float32"):
        export_corpus(
            str(tmp_path / "corpus"),
            str(tmp_path / "out"),
            ParquetLayout(dtype="float16"),
            ["wide"],
        )
