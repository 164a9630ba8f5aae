"""The fingerprint: equal for equal states, different for anything that changes them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from lidit.config import EncoderSettings
from lidit.errors import InputError
from lidit.store import digest_of, spec_differences
from lidit.text import PromptEncoder, resolve_encoder
from tests.helpers.tiny_models import LAYERS, edit_config, tiny_llm

Make = Callable[..., EncoderSettings]


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"layer": -2}, "blocks"),
        ({"instruction": "Describe:"}, "instruction"),
        ({"system_prompt": "Be exact."}, "system_prompt"),
        ({"chat_template": True}, "chat_template"),
        ({"max_tokens": 17}, "max_tokens"),
        ({"dtype": "bfloat16"}, "dtype"),
        ({"storage": "int8"}, "storage"),
        ({"kind": "unmasked"}, "kind"),
    ],
)
def test_every_setting_that_matters_is_in_the_fingerprint(
    change: dict[str, object], field: str, model_of: Callable[[str], Path], settings: Make
) -> None:
    plain = resolve_encoder(settings(model_of("llama")), "cpu")
    changed = resolve_encoder(settings(model_of("llama"), **change), "cpu")
    assert plain.fingerprint != changed.fingerprint == digest_of(changed.to_dict())
    assert [
        line.split(":")[0] for line in spec_differences(plain.to_dict(), changed.to_dict())
    ] == [field]


def test_place_and_name_are_not_in_the_fingerprint(
    tmp_path: Path, model_of: Callable[[str], Path], settings: Make
) -> None:
    copy = tmp_path / "elsewhere"
    shutil.copytree(model_of("llama"), copy)
    edit_config(copy, transformers_version="9.9", _name_or_path="somebody/else")
    here = resolve_encoder(settings(model_of("llama")), "cpu")
    there = resolve_encoder(settings(copy, name="other", layer=LAYERS - 2), "cpu")
    assert here.fingerprint == there.fingerprint
    assert there.folder == str(copy.resolve())


def test_one_changed_weight_changes_the_fingerprint(tmp_path: Path, settings: Make) -> None:
    folder = tiny_llm(tmp_path / "model")
    before = resolve_encoder(settings(folder), "cpu")
    assert resolve_encoder(settings(folder), "cpu") == before  # from the remembered digests
    file = folder / "model.safetensors"
    tensors = load_file(file)
    next(iter(tensors.values()))[0, 0] += 1
    save_file(tensors, file, metadata={"format": "pt"})
    after = resolve_encoder(settings(folder), "cpu")
    assert [line.split(":")[0] for line in spec_differences(before.to_dict(), after.to_dict())] == [
        "weights_sha256"
    ]


@pytest.mark.parametrize(
    ("file", "field"), [("tokenizer.json", "tokenizer_sha256"), ("config.json", "config_sha256")]
)
def test_tokenizer_and_config_count(file: str, field: str, tmp_path: Path, settings: Make) -> None:
    folder = tiny_llm(tmp_path / "model")
    before = resolve_encoder(settings(folder), "cpu")
    content = json.loads((folder / file).read_text())
    if file == "config.json":
        content["rms_norm_eps"] = 1e-3
    else:
        content["added_tokens"][0]["normalized"] = True
    (folder / file).write_text(json.dumps(content))
    after = resolve_encoder(settings(folder), "cpu")
    assert [line.split(":")[0] for line in spec_differences(before.to_dict(), after.to_dict())] == [
        field
    ]


def test_compute_dtype_follows_the_device(model_of: Callable[[str], Path], settings: Make) -> None:
    wanted = settings(model_of("llama"), storage="compute")
    on_cpu, on_gpu = resolve_encoder(wanted, "cpu"), resolve_encoder(wanted, "cuda")
    assert (on_cpu.dtype, on_cpu.storage) == ("float32", "float32")
    assert (on_gpu.dtype, on_gpu.storage) == ("bfloat16", "bfloat16")


@pytest.mark.parametrize("layer", [0, LAYERS + 1, -LAYERS - 1])
def test_a_layer_the_model_lacks_is_refused(
    layer: int, model_of: Callable[[str], Path], settings: Make
) -> None:
    with pytest.raises(InputError, match=f"layer {layer}: .* has {LAYERS} blocks"):
        resolve_encoder(settings(model_of("llama"), layer=layer), "cpu")


def test_what_is_not_a_model_is_refused(
    tmp_path: Path, model_of: Callable[[str], Path], settings: Make
) -> None:
    with pytest.raises(InputError, match="no such model folder"):
        resolve_encoder(settings(tmp_path / "nothing"), "cpu")
    with pytest.raises(InputError, match=r"no config\.json"):
        resolve_encoder(settings(tmp_path), "cpu")
    with pytest.raises(InputError, match="set `revision:`"):
        resolve_encoder(EncoderSettings(name="x", model="somebody/model"), "cpu")
    with pytest.raises(InputError, match="no such packaged model"):
        resolve_encoder(EncoderSettings(name="x", model="package:nothing"), "cpu")
    folder = tmp_path / "pickled"
    shutil.copytree(model_of("llama"), folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(InputError, match="never read"):
        resolve_encoder(settings(folder), "cpu")


def test_code_that_comes_with_a_model_is_never_run(
    tmp_path: Path, model_of: Callable[[str], Path], settings: Make
) -> None:
    folder = tmp_path / "hostile"
    shutil.copytree(model_of("llama"), folder)
    proof = tmp_path / "ran"
    (folder / "evil.py").write_text(
        f"open({str(proof)!r}, 'w').write('x')\nclass C: pass\nclass M: pass\n"
    )
    edit_config(folder, model_type="evil", auto_map={"AutoConfig": "evil.C", "AutoModel": "evil.M"})
    with pytest.raises(InputError, match="never run"):
        resolve_encoder(settings(folder), "cpu")
    assert not proof.exists()


def test_an_offline_hub_id_is_a_clear_error() -> None:
    wanted = EncoderSettings(name="x", model="somebody/model", revision="0" * 40)
    with pytest.raises(InputError, match="cannot be fetched from the hub"):
        resolve_encoder(wanted, "cpu")


def test_encoders_take_no_instruction(model_of: Callable[[str], Path], settings: Make) -> None:
    with pytest.raises(InputError, match="bare caption"):
        resolve_encoder(settings(model_of("bert"), kind="encoder", instruction="Describe:"), "cpu")


def test_resolving_loads_no_weights(
    tmp_path: Path, model_of: Callable[[str], Path], settings: Make
) -> None:
    folder = tmp_path / "torn"
    shutil.copytree(model_of("llama"), folder)
    spec = resolve_encoder(settings(folder), "cpu")
    (folder / "model.safetensors").write_bytes(b"not weights")
    assert resolve_encoder(settings(folder), "cpu").weights_sha256 != spec.weights_sha256
    with pytest.raises(InputError, match="cannot be loaded"):
        PromptEncoder.load(spec, "cpu")
