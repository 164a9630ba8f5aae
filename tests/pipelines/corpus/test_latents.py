"""Latents end to end: aligned with the samples, equal to the codec on the same pixels, the same
bytes always.
"""

import hashlib
import itertools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from lidit.codecs import codec_spec, encoding, load_codec
from lidit.codecs.encoding import LatentEncoder, unit_chunks
from lidit.config import CodecSettings, IngestSettings, PoolSettings
from lidit.errors import InputError, JobError
from lidit.images import Bucket, decode_image, fit
from lidit.sources.reading import bucket_images
from lidit.store import Corpus, FamilyWriter, UnitStatistics
from pipelines.corpus import latents as latents_module
from pipelines.corpus.ingest import run_ingest
from pipelines.corpus.latents import run_latents
from pipelines.runtime import resources
from tests.helpers.corpus_factory import make_corpus
from tests.helpers.pictures import encoded, picture, sample, write_tar
from tests.helpers.recorded_progress import RecordedProgress
from tests.helpers.tiny_codecs import save_codec

pytestmark = pytest.mark.usefixtures("ray_cluster")
ROOT = Path(__file__).parents[3]
SETTINGS = IngestSettings(unit_samples=4, resolution=32, bucket_multiple=8)
SIZES = [(32, 32), (40, 30), (30, 40), (64, 20), (33, 31), (100, 100), (40, 30)]


def originals() -> dict[str, Image.Image]:
    return {f"s{i}": picture(*size, seed=i) for i, size in enumerate(SIZES)}


def expected_pixels(image: Image.Image, bucket: str, scale: int = 1) -> torch.Tensor:
    parsed = Bucket.parse(bucket)
    fitted, _ = fit(image, Bucket(parsed.width * scale, parsed.height * scale))
    return torch.from_numpy(np.asarray(fitted).copy()).permute(2, 0, 1).float() / 127.5 - 1


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    members = []
    for key, image in originals().items():
        members += [(f"{key}.png", encoded(image)), (f"{key}.txt", key.encode())]
    write_tar(tmp_path / "x.tar", members)
    run_ingest([str(tmp_path / "x.tar")], str(tmp_path / "c"), SETTINGS)
    return tmp_path / "c"


ALONE = """
import sys
from lidit.config import CodecSettings, IngestSettings, PoolSettings
from pipelines.corpus.latents import run_latents
made = run_latents(sys.argv[1], CodecSettings(), PoolSettings())
assert made.computed_units == 2 and made.images == 7, made
assert "ray" not in sys.modules
"""


def test_few_units_are_encoded_without_ray_to_the_same_bytes(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    run_ingest([str(tmp_path / "x.tar")], str(tmp_path / "alone"), SETTINGS)
    subprocess.run([sys.executable, "-c", ALONE, str(tmp_path / "alone")], cwd=ROOT, check=True)
    run_latents(str(corpus), CodecSettings(), PoolSettings())
    assert len(files(corpus)) == 2
    assert files(corpus) == files(tmp_path / "alone")


def files(corpus: Path) -> dict[str, str]:
    return {
        p.name: hashlib.sha256(p.read_bytes()).hexdigest()
        for p in corpus.glob("latents/*/0*.arrow")
    }


def test_pixels_are_exact_and_aligned_also_where_an_actor_dies(corpus: Path) -> None:
    killed = []

    def kill(done: int) -> None:
        if done == 1:
            ours = psutil.Process().children(recursive=True)  # never another cluster's actor
            killed.extend(p for p in ours if any("LatentsActor" in word for word in p.cmdline()))
            for process in killed:
                process.kill()

    progress = RecordedProgress(kill)
    summary = run_latents(str(corpus), CodecSettings(), PoolSettings(), progress)
    assert killed
    assert (summary.images, summary.units, summary.computed_units) == (7, 2, 2)
    assert progress.calls == [(0, 2), (1, 2), (2, 2)]
    opened = Corpus.open(corpus)
    family = opened.latent_family("pixels")
    images = originals()
    for unit in range(2):
        family.verify_unit(unit)
        samples = opened.samples(unit).to_pylist()
        for row, latent in zip(samples, family.read(unit), strict=True):
            expected = expected_pixels(images[row["key"]], row["bucket"])
            assert torch.equal(latent.mul(127.5).round(), expected.mul(127.5).round())
            assert latent.dtype == torch.float32
    crop = family.folder.read_table(family.record(0)["file"])["crop"].to_pylist()
    assert crop[0] == {"left": 0, "top": 0, "width": 32, "height": 32}
    assert crop[1]["width"] == 40
    again = run_latents(str(corpus), CodecSettings(), PoolSettings())
    assert again.computed_units == 0


def loop_over_units(corpus: Path, settings: CodecSettings) -> LatentEncoder:
    """The same job in this process, without a cluster."""
    opened, encoder = Corpus.open(corpus), LatentEncoder(load_codec(settings))
    writer = FamilyWriter.open_or_create(
        str(corpus), "latents", settings.name, codec_spec(settings)
    )
    for unit in writer.pending():
        statistics = UnitStatistics()
        chunks = (bucket_images(opened, unit, *rows, scale=1, max_pixels=SETTINGS.max_pixels)
                  for rows in unit_chunks(opened, unit))  # fmt: skip
        writer.publish(unit, encoder.tables(chunks, statistics), statistics=statistics)
    writer.finish({"codec": settings.model_dump(mode="json")})
    return encoder


def test_latents_equal_the_codec_and_bytes_do_not_depend_on_actors(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = CodecSettings(name="kl", model=str(save_codec(tmp_path / "kl", "AutoencoderKL")))
    assert loop_over_units(corpus, settings).codec_seconds > 0
    assert run_latents(str(corpus), settings, PoolSettings()).computed_units == 0
    opened = Corpus.open(corpus)
    family, codec, images = opened.latent_family("kl"), load_codec(settings), originals()
    for unit in range(2):
        samples = opened.samples(unit).to_pylist()
        seeds = list(range(len(samples)))
        sampled, means = family.read(unit, None, seeds), family.read(unit)
        for row, mean, drawn, seed in zip(samples, means, sampled, seeds, strict=True):
            expected = codec.encode(expected_pixels(images[row["key"]], row["bucket"])[None])
            assert torch.allclose(mean, expected.mean[0], atol=1e-5)
            noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(seed))
            assert torch.allclose(drawn, (expected.mean + expected.deviation * noise)[0], atol=1e-5)
        assert torch.equal(family.read(unit, [1], [5])[0], family.read(unit, [1], [5])[0])
        assert not torch.equal(family.read(unit, [1], [5])[0], family.read(unit, [1], [6])[0])
        assert [tuple(m.shape) for m in means] == family.shapes(unit)
    before = files(corpus)
    for path in corpus.glob("latents/*/*"):
        path.unlink()
    monkeypatch.setattr(latents_module, "WINDOW", 1)
    assert run_latents(str(corpus), settings, PoolSettings(actors=2, cpus=0.5)).computed_units == 2
    assert files(corpus) == before
    assert len(before) == 2


def test_chunks_cover_a_unit_without_gaps(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "CHUNK_PIXELS", 2 * 32 * 32)
    opened = Corpus.open(corpus)
    chunks_of_two = unit_chunks(opened, 0)
    assert chunks_of_two[0][0] == 0
    assert chunks_of_two[-1][1] == len(opened.samples(0))
    assert len(chunks_of_two) > 1
    assert all(stop == start for (_, stop), (start, _) in itertools.pairwise(chunks_of_two))


def test_other_scale_and_sources_that_have_moved(corpus: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    moved.mkdir()
    (tmp_path / "x.tar").rename(moved / "x.tar")
    settings = CodecSettings(name="double", scale=2)
    with pytest.raises(
        JobError,
        match=r"x\.tar s0\.png: sample s0 is not what was ingested (.|\n)*their " r"new place",
    ):
        run_latents(str(corpus), settings, PoolSettings())
    assert run_ingest([str(moved / "x.tar")], str(corpus), SETTINGS).moved_to == str(moved)
    run_latents(str(corpus), settings, PoolSettings())
    opened = Corpus.open(corpus)
    row = opened.samples(0).to_pylist()[1]
    latent = opened.latent_family("double").read(0, [1])[0]
    expected = expected_pixels(originals()[row["key"]], row["bucket"], 2)
    assert torch.equal(latent.mul(127.5).round(), expected.mul(127.5).round())


def test_codec_and_corpus_that_do_not_fit_are_refused_first(corpus: Path, tmp_path: Path) -> None:
    make_corpus(tmp_path / "captions", [("only words",)])
    with pytest.raises(InputError, match="captions only"):
        run_latents(str(tmp_path / "captions"), CodecSettings(), PoolSettings())
    write_tar(tmp_path / "odd.tar", sample("a"))
    odd = IngestSettings(resolution=33, bucket_multiple=3)
    run_ingest([str(tmp_path / "odd.tar")], str(tmp_path / "odd"), odd)
    settings = CodecSettings(name="kl", model=str(save_codec(tmp_path / "kl", "AutoencoderKL")))
    with pytest.raises(InputError, match="multiples of 2"):
        run_latents(str(tmp_path / "odd"), settings, PoolSettings())


def test_what_this_machine_does_not_have_is_refused(corpus: Path) -> None:
    with pytest.raises(InputError, match="1 actors ask for 1 GPU, this machine offers 0"):
        run_latents(str(corpus), CodecSettings(), PoolSettings(gpus=1))
    with pytest.raises(InputError, match="ask for 900 CPU"):
        run_latents(str(corpus), CodecSettings(), PoolSettings(actors=9, cpus=100))


@pytest.mark.slow
def test_actors_that_hold_every_cpu_still_get_pictures(corpus: Path) -> None:
    told, all_of_them = RecordedProgress(), PoolSettings(cpus=resources.total("CPU"))
    run_latents(str(corpus), CodecSettings(), all_of_them, told)
    assert len(told.notes) == 2
    assert all("no CPU left for decoding: use fewer actors" in note for note in told.notes)
    assert Corpus.open(corpus).latent_family("pixels").records["rows"].to_pylist() == [4, 3]


AS_MANY_ACTORS_AS_CPUS = """
import os, sys
from lidit.config import CodecSettings, PoolSettings
from pipelines.runtime import resources
from pipelines.corpus.latents import run_latents
run_latents(sys.argv[1], CodecSettings(), PoolSettings(cpus=os.cpu_count()))
print(resources.total("CPU") - os.cpu_count())
"""


@pytest.mark.slow
def test_an_embedded_cluster_has_a_cpu_for_decoding_besides_the_actors(corpus: Path) -> None:
    command = [sys.executable, "-c", AS_MANY_ACTORS_AS_CPUS, str(corpus)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == 1


def test_a_codec_that_cannot_be_loaded_is_the_users_mistake(corpus: Path, tmp_path: Path) -> None:
    folder = save_codec(tmp_path / "kl", "AutoencoderKL")
    weights = next(folder.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(InputError, match="the codec cannot be loaded"):
        run_latents(str(corpus), CodecSettings(name="kl", model=str(folder)), PoolSettings())


@pytest.mark.slow
def test_an_actor_with_other_codec_files_makes_no_second_family(
    corpus: Path, tmp_path: Path
) -> None:
    folder = save_codec(tmp_path / "kl", "AutoencoderKL")

    def replaced(done: int) -> None:
        """The actor starts again where the files are others: as on another node."""
        save_codec(folder, "AutoencoderKL", seed=1)
        for process in psutil.Process().children(recursive=True):
            if any("LatentsActor" in word for word in process.cmdline()):
                process.kill()

    with pytest.raises(InputError, match=r"kl: this node has other codec files .*weights_sha256"):
        run_latents(
            str(corpus),
            CodecSettings(name="kl", model=str(folder)),
            PoolSettings(),
            RecordedProgress(replaced),
        )
    assert len(list((corpus / "latents").iterdir())) == 1


KINDS = ["tar", "gz", "parquet", "parquet-paths", "jsonl", "folder"]


def write_source(source: Path, kind: str, images: dict[str, bytes]) -> None:
    source.mkdir(exist_ok=True)
    if kind in ("tar", "gz"):
        members = [
            m
            for key, content in images.items()
            for m in ((f"{key}.png", content), (f"{key}.txt", b"x"))
        ]
        write_tar(
            source / ("x.tar.gz" if kind == "gz" else "x.tar"),
            members,
            "w:gz" if kind == "gz" else "w",
        )
    elif kind == "parquet":
        columns = {
            "key": list(images),
            "image": list(images.values()),
            "caption": ["x"] * len(images),
        }
        pq.write_table(pa.table(columns), source / "x.parquet")
    else:
        for key, content in images.items():
            (source / f"{key}.png").write_bytes(content)
            if kind == "folder":
                (source / f"{key}.txt").write_text("x")
        rows = [{"key": key, "image_path": f"{key}.png", "caption": "x"} for key in images]
        if kind == "jsonl":
            (source / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        elif kind == "parquet-paths":
            pq.write_table(pa.Table.from_pylist(rows), source / "x.parquet")


@pytest.mark.parametrize("kind", KINDS)
def test_images_are_found_again_in_every_kind_of_source(tmp_path: Path, kind: str) -> None:
    source = tmp_path / "source"
    images = {key: encoded(image) for key, image in originals().items()}
    write_source(source, kind, images)
    run_ingest([str(source)], str(tmp_path / "c"), SETTINGS)
    corpus = Corpus.open(tmp_path / "c")
    found = {}
    for unit in range(corpus.num_units):
        rows = corpus.samples(unit).to_pylist()
        pixels, _ = bucket_images(corpus, unit, 1, len(rows), 1, 10**6)
        for row, image in zip(rows[1:], pixels, strict=True):
            found[row["key"].rpartition("/")[2]] = (image, row["bucket"])
    assert len(found) == len(images) - corpus.num_units
    for key, (image, bucket) in found.items():
        fitted, _ = fit(decode_image(images[key]).image, Bucket.parse(bucket))
        assert np.array_equal(image, np.asarray(fitted))


def read_all(corpus: Corpus) -> None:
    for unit in range(corpus.num_units):
        bucket_images(corpus, unit, 0, corpus.samples(unit).num_rows, 1, 10**6)


@pytest.mark.parametrize("kind", KINDS)
def test_another_picture_of_the_same_size_in_pixels_is_an_error(tmp_path: Path, kind: str) -> None:
    source = tmp_path / "source"
    images = {key: encoded(image) for key, image in originals().items()}
    write_source(source, kind, images)
    before = {path.name: path.stat().st_size for path in source.iterdir()}
    run_ingest([str(source)], str(tmp_path / "c"), SETTINGS)
    corpus = Corpus.open(tmp_path / "c")
    read_all(corpus)
    write_source(source, kind, images | {"s5": encoded(picture(*SIZES[5], seed=9))})
    if kind == "tar":
        assert {path.name: path.stat().st_size for path in source.iterdir()} == before, (
            "too easy: tars are padded"
        )
    with pytest.raises(
        JobError,
        match=r"is not what was ingested \(.* bytes\b.*\); put the old file " r"back, or ingest",
    ):
        read_all(corpus)


def test_tar_members_of_equal_sizes_in_another_order_are_an_error(tmp_path: Path) -> None:
    source = tmp_path / "source"
    images = {f"s{i}": encoded(picture(seed=i), "BMP") for i in range(3)}
    write_source(source, "tar", images)
    run_ingest([str(source)], str(tmp_path / "c"), SETTINGS)
    write_source(source, "tar", {key: images[key] for key in ("s1", "s0", "s2")})
    with pytest.raises(
        JobError,
        match=r"s0\.png: sample s0 is not what was ingested \(in its place is " r"'s1\.png' of",
    ):
        read_all(Corpus.open(tmp_path / "c"))
