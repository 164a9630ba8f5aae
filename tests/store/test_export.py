"""Export and summary: what other loaders read is what the corpus holds; counts are those of the
files.
"""

import fcntl
import io
import json
import tarfile
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load

from lidit.errors import InputError
from lidit.store import Corpus, FamilyWriter
from lidit.store.export import export_corpus
from lidit.store.files.owner import owned
from lidit.store.summary import norms_by_position, plot_corpus, summarise, token_lengths
from tests.helpers import family_job
from tests.helpers.corpus_factory import WORDS, make_corpus

UNITS = [WORDS, ("one", "two", "one")]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    make_corpus(tmp_path / "corpus", UNITS)
    family_job.run(str(tmp_path / "corpus"), "bfloat16")
    return tmp_path / "corpus"


def images(corpus: Corpus, unit: int) -> list[bytes]:
    return [f"{unit}/{row}".encode() for row in range(len(UNITS[unit]))]


def test_webdataset_export_holds_keys_captions_states_and_images(
    corpus: Path, tmp_path: Path
) -> None:
    names = export_corpus(str(corpus), str(tmp_path / "out"), "webdataset", ["fake"], images)
    assert names == ["00000.tar", "00001.tar"]
    seen = []
    for unit, name in enumerate(names):
        with tarfile.open(tmp_path / "out" / name) as archive:
            members = {m.name: archive.extractfile(m).read() for m in archive}
        for row, caption in enumerate(UNITS[unit]):
            stem = f"{unit:05d}_{row:06d}"
            facts = json.loads(members[f"{stem}.json"])
            assert facts["key"] == f"{unit}-{row}"
            assert facts["captions"] == [{"text": caption, "origin": "original"}]
            assert members[f"{stem}.image"] == f"{unit}/{row}".encode()
            states = load(members[f"{stem}.fake.safetensors"])["0"]
            assert torch.equal(states, family_job.states_of(caption)[1].bfloat16())
            seen.append(stem)
        assert len(members) == 3 * len(UNITS[unit])
    assert len(seen) == 9


def test_webdataset_export_is_read_by_webdataset(corpus: Path, tmp_path: Path) -> None:
    import webdataset

    export_corpus(str(corpus), str(tmp_path / "out"), "webdataset", ["fake"])
    samples = list(webdataset.WebDataset(str(tmp_path / "out" / "00001.tar"), shardshuffle=False))
    assert [json.loads(s["json"])["captions"][0]["text"] for s in samples] == list(UNITS[1])
    assert "fake.safetensors" in samples[0]


def test_parquet_export_is_one_row_per_sample_and_caption(corpus: Path, tmp_path: Path) -> None:
    export_corpus(str(corpus), str(tmp_path / "out"), "parquet", ["fake"], images)
    table = pq.read_table(tmp_path / "out")
    assert table["caption"].to_pylist() == [c for unit in UNITS for c in unit]
    for row in table.to_pylist():
        states = torch.tensor(row["fake_states"]).view(-1, family_job.WIDTH)
        assert torch.equal(states, family_job.states_of(row["caption"])[1].bfloat16().float())
        assert len(states) == row["fake_tokens"]
    assert table["image"].to_pylist()[-1] == b"1/2"


def test_export_goes_on_where_it_was_and_refuses_damaged_units(
    corpus: Path, tmp_path: Path
) -> None:
    export_corpus(str(corpus), str(tmp_path / "out"), "parquet", ["fake"])
    first = tmp_path / "out" / "00000.parquet"
    stamp = first.stat().st_mtime_ns
    (tmp_path / "out" / "00001.parquet").unlink()
    data = next(corpus.glob("text/*/00001-*.arrow"))
    data.write_bytes(data.read_bytes()[:-1] + b"?")
    with pytest.raises(InputError, match=data.name):
        export_corpus(str(corpus), str(tmp_path / "out"), "parquet", ["fake"])
    assert not (tmp_path / "out" / "00001.parquet").exists()
    assert first.stat().st_mtime_ns == stamp
    with pytest.raises(InputError, match="choose one of"):
        export_corpus(str(corpus), str(tmp_path / "out"), "zip")


def test_what_a_killed_export_left_is_removed_and_what_a_living_one_writes_stays(
    corpus: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    export_corpus(str(corpus), str(out), "parquet")
    (out / "00001.parquet").unlink()
    (out / ".tmp-abandoned").write_bytes(b"half a unit")
    with (out / ".tmp-living").open("wb") as living:
        fcntl.flock(living, fcntl.LOCK_EX)
        export_corpus(str(corpus), str(out), "parquet")
    assert {path.name for path in out.iterdir()} == {
        "00000.parquet",
        "00001.parquet",
        ".tmp-living",
    }


def test_a_second_export_into_one_folder_is_refused(corpus: Path, tmp_path: Path) -> None:
    with (
        owned(tmp_path / "out", "filled"),
        pytest.raises(InputError, match="out: is being filled by process"),
    ):
        export_corpus(str(corpus), str(tmp_path / "out"), "parquet")
    assert export_corpus(str(corpus), str(tmp_path / "out"), "parquet") == [
        "00000.parquet",
        "00001.parquet",
    ]


def test_a_folder_belongs_to_one_export(corpus: Path, tmp_path: Path) -> None:
    """Files of the same names from another export would pass for its own: without states, or of
    another corpus.
    """
    out = tmp_path / "out"
    export_corpus(str(corpus), str(out), "parquet")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    make_corpus(tmp_path / "other", [("three", "four"), ("five",)])
    family_job.run(str(corpus), "int8")
    first, second = (family.directory for family in Corpus.open(corpus).text_families())
    for message, arguments in (
        (r"families\.fake: null -> \{", (str(corpus), str(out), "parquet", [first])),
        (r"corpus: ", (str(tmp_path / "other"), str(out), "parquet")),
        (r"format: \"parquet\" -> \"webdataset\"", (str(corpus), str(out), "webdataset")),
        (r"images: false -> true", (str(corpus), str(out), "parquet", [], images)),
    ):
        with pytest.raises(
            InputError, match=f"out: holds another export .*{message}.*give a new folder"
        ):
            export_corpus(*arguments)  # type: ignore[arg-type]
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    export_corpus(str(corpus), str(tmp_path / "states"), "parquet", [first])
    # the name is the same, the states are others
    with pytest.raises(InputError, match=r"families\.fake"):
        export_corpus(str(corpus), str(tmp_path / "states"), "parquet", [second])
    with pytest.raises(InputError, match="two have one name"):
        export_corpus(str(corpus), str(tmp_path / "both"), "parquet", [first, second])


def test_a_folder_of_something_else_is_refused(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "00000.parquet").write_bytes(b"not ours")
    with pytest.raises(InputError, match=r"00000\.parquet: damaged, or not of lidit export"):
        export_corpus(str(corpus), str(tmp_path / "used"), "parquet")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "notes.txt").touch()
    with pytest.raises(InputError, match="notes: not empty and no export"):
        export_corpus(str(corpus), str(tmp_path / "notes"), "parquet")
    with pytest.raises(InputError, match=r"00000\.parquet: is a file"):
        export_corpus(str(corpus), str(tmp_path / "used" / "00000.parquet"), "parquet")
    (tmp_path / "killed").mkdir()
    # what a kill while the first file was written leaves
    (tmp_path / "killed" / ".tmp-0123").touch()
    export_corpus(str(corpus), str(tmp_path / "killed"), "parquet")
    (tmp_path / "killed" / "_export.json").write_text("{}")
    with pytest.raises(InputError, match=r"_export\.json: damaged"):
        export_corpus(str(corpus), str(tmp_path / "killed"), "parquet")


def test_summary_counts_what_is_there(corpus: Path) -> None:
    unfinished = FamilyWriter.open_or_create(str(corpus), "text", "half", {"storage": "float32"})
    unfinished.write_shared(family_job.shared())
    family_job.publish(unfinished, 1)
    summary = summarise(Corpus.open(corpus))
    assert (summary.units, summary.samples, summary.captions) == (2, 9, 8)
    assert summary.distinct_captions == len(set(WORDS) | {"one", "two"})
    complete, half = sorted(summary.families, key=lambda f: not f.complete)
    tokens = sum(len(c) for unit in UNITS for c in set(unit))
    assert (complete.units, complete.rows, complete.tokens, complete.storage) == (
        2,
        8,
        tokens,
        "bfloat16",
    )
    assert 0 < complete.storage_error < 1
    assert (half.complete, half.units, half.rows, half.tokens) == (False, 1, 2, 6)
    assert summarise(Corpus.open(corpus), count_limit=1).distinct_captions is None


def test_plots_show_lengths_and_norms(corpus: Path, tmp_path: Path) -> None:
    family = Corpus.open(corpus).text_family("fake")
    assert sorted(token_lengths(family)) == sorted(len(c) for unit in UNITS for c in set(unit))
    raw, _ = norms_by_position(family)
    firsts = [
        family_job.states_of(c)[1].bfloat16().float()[0].norm()
        for u in UNITS
        for c in dict.fromkeys(u)
        if c
    ]
    assert raw[0] == pytest.approx(torch.stack(firsts).mean().item(), rel=1e-5)
    paths = plot_corpus(Corpus.open(corpus), tmp_path / "plots")
    assert len(paths) == 2
    for path in paths:
        image = Image.open(io.BytesIO(path.read_bytes()))
        assert min(image.size) > 300


def conditioned(corpus: Path, **condition: object) -> None:
    """The corpus's family, as of an encoder that names a pipeline."""
    family = Corpus.open(corpus).text_family("fake")
    writer = FamilyWriter(str(corpus), "text", "fake", family.spec)
    writer.folder.remove("MANIFEST.json")
    layout = {
        "pipeline": "FluxPipeline", "states": "prompt_embeds", "mask": "prompt_embeds_mask",
        "pooled": None,
        "mask_dtype": "int64", "mask_if_full": True, "instruction": 0, "layout": "batch",
        "side": "right", "bundles": 1,
    }  # fmt: skip
    writer.finish({"encoder": {"condition": {**layout, **condition}}})


def test_diffusers_export_holds_the_calls_arguments_and_an_index(
    corpus: Path, tmp_path: Path
) -> None:
    conditioned(corpus, instruction="all")
    names = export_corpus(str(corpus), str(tmp_path / "out"), "diffusers", ["fake"])
    assert names == ["00000.safetensors", "00001.safetensors"]
    prefix = Corpus.open(corpus).text_family("fake").shared().prefix.bfloat16()
    index = pq.read_table(tmp_path / "out" / "index.parquet").to_pylist()
    assert [line["caption"] for line in index] == [caption for unit in UNITS for caption in unit]
    for line in index:
        tensors = load((tmp_path / "out" / line["file"]).read_bytes())
        states = tensors[f"{line['row']:06d}.prompt_embeds"]
        expected = torch.cat([prefix, family_job.states_of(line["caption"])[1].bfloat16()])
        assert torch.equal(states, expected[None])
        assert tensors[f"{line['row']:06d}.prompt_embeds_mask"].tolist() == [[1] * len(expected)]
        assert tensors["negative_prompt_embeds"].shape[0] == 1
    assert export_corpus(str(corpus), str(tmp_path / "out"), "diffusers", ["fake"]) == names


def test_diffusers_export_needs_families_that_name_a_pipeline(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="names no pipeline"):
        export_corpus(str(corpus), str(tmp_path / "out"), "diffusers", ["fake"])
    with pytest.raises(InputError, match="at least one"):
        export_corpus(str(corpus), str(tmp_path / "out"), "diffusers")
    conditioned(corpus)
    with pytest.raises(InputError, match="both prompt_embeds"):
        export_corpus(str(corpus), str(tmp_path / "out"), "diffusers", ["fake", "fake"])
    with pytest.raises(InputError, match="no images"):
        export_corpus(str(corpus), str(tmp_path / "out"), "diffusers", ["fake"], images)
    assert not (tmp_path / "out").exists()
