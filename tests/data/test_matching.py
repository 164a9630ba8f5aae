"""Which of a corpus's latents a recipe trains on: those of its own codec, weights included, or
none.
"""

from pathlib import Path

import pytest
import torch

from lidit.codecs import codec_spec
from lidit.config import CodecSettings, Recipe
from lidit.data.matching import matching_family, matching_latents
from lidit.errors import InputError
from lidit.plan.facts import gather_facts
from lidit.store import Corpus, FamilyWriter, latents_table
from lidit.store.latent_file import Crop
from pipelines.training.train import run_facts
from tests.helpers.corpus_factory import make_corpus
from tests.helpers.embed_job import embed_here, encoder
from tests.helpers.tiny_codecs import save_codec
from tests.helpers.tiny_models import tiny_llm

UNITS = [("a red circle", "a blue square"), ("a star",)]


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    return make_corpus(tmp_path / "corpus", UNITS)


def vae(tmp_path: Path, seed: int, **changes: object) -> CodecSettings:
    """Codecs of one name and one architecture; the seed makes the weights."""
    folder = tmp_path / f"vae-{seed}"
    if not folder.exists():
        save_codec(folder, "AutoencoderKL", seed)
    return CodecSettings.model_validate({"name": "vae", "model": str(folder), **changes})


def write_latents(
    corpus: Corpus, codec: CodecSettings, device: str = "cpu", finish: bool = True
) -> str:
    """A family with this codec's spec; its fingerprint."""
    spec = codec_spec(codec, device)
    writer = FamilyWriter.open_or_create(corpus.folder.location, "latents", codec.name, spec)
    for unit, captions in enumerate(UNITS):
        crops = [Crop(0, 0, 8, 8)] * len(captions)
        writer.publish(
            unit, latents_table([torch.zeros(4, 4, 4)] * len(captions), crops, "float32")
        )
    if finish:
        writer.finish()
    return writer.fingerprint


def test_a_run_takes_the_latents_of_its_own_weights_and_no_others(
    corpus: Corpus, tmp_path: Path
) -> None:
    llm = encoder(tiny_llm(tmp_path / "llm", "llama"))
    embed_here(corpus.folder.path, llm)
    tree = {"name": "r", "corpus": corpus.folder.location, "encoders": [llm.model_dump()]}
    one, other = (
        Recipe.model_validate(tree | {"codec": vae(tmp_path, seed).model_dump()}) for seed in (1, 2)
    )
    made = write_latents(corpus, one.codec)
    assert run_facts(one, corpus)["latents"] == made
    with pytest.raises(
        InputError, match=r"no latents family 'vae'(.|\n)*weights_sha256: (.|\n)*lidit " r"latents"
    ):
        run_facts(other, corpus)
    retrained = write_latents(corpus, other.codec)  # of the same name
    assert run_facts(other, corpus)["latents"] == retrained != made
    assert run_facts(one, corpus)["latents"] == made
    pixels = write_latents(corpus, CodecSettings())
    assert run_facts(Recipe.model_validate(tree), corpus)["latents"] == pixels


def test_a_plan_minds_no_second_family_of_the_name(corpus: Corpus, tmp_path: Path) -> None:
    """A codec trained again leaves two latents of one name, another instruction two families of one
    encoder.
    """
    bare, instructed = (
        encoder(tiny_llm(tmp_path / "llm", "llama"), instruction=text)
        for text in ("", "Describe it:")
    )
    for llm in (bare, instructed):
        embed_here(corpus.folder.path, llm)
    for seed in (1, 2):
        write_latents(corpus, vae(tmp_path, seed))
    tree = {"name": "r", "corpus": corpus.folder.location, "codec": vae(tmp_path, 1).model_dump()}
    for llm in (bare, instructed):
        facts = gather_facts(Recipe.model_validate(tree | {"encoders": [llm.model_dump()]}))
        assert facts.latent == (4, 4, 4)
        assert (facts.prefix_tokens[llm.name] > 0) == (llm is instructed)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"scale": 2}, "scale: 1 -> 2"),
        ({"posterior": "mean"}, "posterior: true -> false"),
        ({"storage": "bfloat16"}, "storage"),
        ({"model": None}, 'codec: "AutoencoderKL" -> "pixels"'),
    ],
)
def test_the_fields_that_differ_are_named(
    corpus: Corpus, tmp_path: Path, changes: dict[str, object], field: str
) -> None:
    write_latents(corpus, vae(tmp_path, 1))
    with pytest.raises(InputError, match=f"found -> wanted:\n  vae-[0-9a-f]{{12}}: (.|\n)*{field}"):
        matching_latents(corpus, vae(tmp_path, 1, **changes))


def test_an_automatic_dtype_takes_what_is_there(corpus: Corpus, tmp_path: Path) -> None:
    automatic = vae(tmp_path, 1)
    on_gpu = write_latents(corpus, automatic, "cuda")
    assert matching_latents(corpus, automatic) == on_gpu
    with pytest.raises(InputError, match='dtype: "bfloat16" -> "float32"'):
        matching_latents(corpus, vae(tmp_path, 1, dtype="float32"))
    on_cpu = write_latents(corpus, automatic, "cpu")
    with pytest.raises(InputError, match=r"several dtypes: .*bfloat16.*set codec\.dtype"):
        matching_latents(corpus, automatic)
    assert matching_latents(corpus, vae(tmp_path, 1, dtype="float32")) == on_cpu
    assert matching_latents(corpus, vae(tmp_path, 1, dtype="bfloat16")) == on_gpu


def test_one_name_for_two_llms_is_refused(corpus: Corpus, tmp_path: Path) -> None:
    first, second = (
        encoder(tiny_llm(tmp_path / kind, kind), name="one") for kind in ("llama", "qwen2")
    )
    embed_here(corpus.folder.path, first)
    embed_here(corpus.folder.path, second)
    with pytest.raises(
        InputError, match=r"one-\w+ and one-\w+ both fit encoder " r"'one'(.|\n)*weights_sha256"
    ):
        matching_family(corpus, first)


def test_states_of_another_error_are_no_match(corpus: Corpus, tmp_path: Path) -> None:
    llm = tiny_llm(tmp_path / "llm", "llama")
    coarse = encoder(llm, storage="coded", storage_error=0.2)
    embed_here(corpus.folder.path, coarse)
    assert matching_family(corpus, coarse).spec["storage_error"] == 0.2
    for usual in (encoder(llm, storage="coded"), encoder(llm, storage="coded", storage_error=0.1)):
        with pytest.raises(InputError, match=r"storage_error: 0\.2 -> 0\.1"):
            matching_family(corpus, usual)
    embed_here(corpus.folder.path, encoder(llm, storage="coded"))
    assert matching_family(corpus, encoder(llm, storage="coded")).spec["storage_error"] == 0.1
    assert matching_family(corpus, coarse).spec["storage_error"] == 0.2


@pytest.mark.parametrize("finished", ["cpu", "cuda"])
def test_an_unfinished_family_is_no_second_one(
    corpus: Corpus, tmp_path: Path, finished: str
) -> None:
    made = {
        device: write_latents(corpus, vae(tmp_path, 1), device, device == finished)
        for device in ("cpu", "cuda")
    }
    assert matching_latents(corpus, vae(tmp_path, 1)) == made[finished]


def test_what_is_not_there_or_not_finished_is_said(corpus: Corpus, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no latents family 'vae'; there are: none"):
        matching_latents(corpus, vae(tmp_path, 1))
    write_latents(corpus, vae(tmp_path, 1), finish=False)
    with pytest.raises(InputError, match=r"vae-[0-9a-f]{12}: incomplete"):
        matching_latents(corpus, vae(tmp_path, 1))
