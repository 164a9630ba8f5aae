"""A model folder loaded as diffusers loads folders, and uploaded to a hub as it uploads them."""

import base64
import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub
import pytest
import torch
from diffusers import (
    BitsAndBytesConfig,
    DiffusionPipeline,
    PipelineQuantizationConfig,
    TorchAoConfig,
)
from huggingface_hub import ModelCard
from PIL import Image

from lidit.errors import InputError
from lidit.pipeline import LIDiTPipeline
from lidit.pipeline.places import network_config
from tests.helpers.prompts import PROMPTS

WEIGHTS = "model/diffusion_pytorch_model.safetensors"
COMMIT = "0123456789" * 4


def drawn(pipeline, **options):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(PROMPTS[:2], seed=[1, 2], output_type="pt", **options).images


@pytest.fixture
def expected(pipe):
    return drawn(pipe)


def test_diffusers_loads_the_folder_as_a_pipeline_of_ones_own(saved, expected):
    """Only its own loader runs, not ours: LLMs and checks have to come with the first prompt."""
    # The code that diffusers wants to be trusted is the pipeline.py that `save` wrote a moment ago.
    pipeline = DiffusionPipeline.from_pretrained(
        str(saved),
        custom_pipeline=str(saved),
        trust_remote_code=True,  # the pipeline.py that `save` wrote a moment ago
    )
    assert type(pipeline) is LIDiTPipeline
    assert torch.equal(drawn(pipeline), expected)
    with pytest.raises(ValueError, match="contains custom code"):
        DiffusionPipeline.from_pretrained(str(saved), custom_pipeline=str(saved))


def test_diffusers_finds_damage_and_missing_llms_at_the_first_prompt(saved, tmp_path):
    folder = shutil.copytree(saved, tmp_path / "copy")
    path = folder / "encoders" / "qwen.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")

    def load():  # trusts the folder's own pipeline.py, which this test's fixture wrote
        return DiffusionPipeline.from_pretrained(
            str(folder),
            custom_pipeline=str(folder),
            trust_remote_code=True,  # the same file: the test copied it
        )

    with pytest.raises(InputError, match=r"qwen.safetensors: damaged"):
        drawn(load())
    shutil.rmtree(folder / "encoders")
    with pytest.raises(InputError, match="the encoders' files are not beside the model"):
        drawn(load())


def test_torch_dtype_is_the_dtype(saved):
    half = LIDiTPipeline.from_pretrained(saved, torch_dtype=torch.bfloat16)
    assert half.transformer.final_linear.weight.dtype == torch.bfloat16
    with pytest.raises(InputError, match="give one of them"):
        LIDiTPipeline.from_pretrained(saved, dtype=torch.float32, torch_dtype=torch.bfloat16)
    with pytest.raises(InputError, match="torch_dtype: 'bf16' is no dtype"):
        LIDiTPipeline.from_pretrained(saved, torch_dtype="bf16")


def test_a_device_map_is_a_device(saved):
    assert LIDiTPipeline.from_pretrained(saved, device_map="meta").model.device.type == "meta"
    with pytest.raises(
        InputError, match=r"device_map: 'balanced' is no device; .* enable_model_cpu_offload"
    ):
        LIDiTPipeline.from_pretrained(saved, device_map="balanced")


@pytest.mark.parametrize("shard", ["20KB", "5GB"])
def test_a_variant_lies_beside_the_weights(saved, expected, tmp_path, shard):
    folder = shutil.copytree(saved, tmp_path / "copy")
    half = LIDiTPipeline.from_pretrained(saved, dtype=torch.bfloat16)
    half.save_pretrained(folder, max_shard_size=shard, variant="bf16")
    assert torch.equal(drawn(LIDiTPipeline.from_pretrained(folder)), expected)
    again = LIDiTPipeline.from_pretrained(folder, variant="bf16")
    assert torch.equal(
        again.transformer.final_linear.weight, half.transformer.final_linear.weight.float()
    )
    with pytest.raises(InputError, match=r"no variant 'fp16'; give one of bf16, or none$"):
        LIDiTPipeline.from_pretrained(folder, variant="fp16")
    with pytest.raises(InputError, match=r"no variant 'bf16'; it has none: leave it out$"):
        LIDiTPipeline.from_pretrained(saved, variant="bf16")


def test_pickles_are_not_written(pipe, tmp_path):
    with pytest.raises(InputError, match="pickles"):
        pipe.save_pretrained(tmp_path, safe_serialization=False)
    assert not list(tmp_path.iterdir())


def test_a_folder_of_the_hub_is_found_without_asking_it(saved, expected, tmp_path, monkeypatch):
    cache = tmp_path / "hub" / "models--owner--model"
    shutil.copytree(saved, cache / "snapshots" / COMMIT)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    # nobody answers there
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", "http://127.0.0.1:9")
    assert torch.equal(
        drawn(LIDiTPipeline.from_pretrained("owner/model", local_files_only=True)), expected
    )
    with pytest.raises(InputError, match="nobody/model: cannot be fetched from the hub"):
        LIDiTPipeline.from_pretrained("nobody/model", local_files_only=True)


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as an upload of small files asks for; keeps what it is given."""

    files: dict[str, bytes] = {}
    created: list[dict] = []

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/api/repos/create":
            self.created.append(json.loads(body))
            return self.answer({"url": f"{self.origin}/owner/model"})
        if "/preupload/" in self.path:
            named = [entry["path"] for entry in json.loads(body)["files"]]
            files = [
                {"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in named
            ]
            return self.answer({"files": files})
        if "/commit/" in self.path:
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    self.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            return self.answer({"success": True,
                                "commitUrl": f"{self.origin}/owner/model/commit/{COMMIT}",
                                "commitOid": COMMIT})  # fmt: skip
        return self.answer({})

    def do_GET(self):
        return self.answer({"name": "owner", "type": "user", "orgs": []})

    @property
    def origin(self):
        return f"http://127.0.0.1:{self.server.server_port}"

    def answer(self, tree):
        content = json.dumps(tree).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_arguments):
        pass


@pytest.fixture
def hub(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    Hub.files, Hub.created = {}, []
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(
        huggingface_hub.hf_api.api, "endpoint", f"http://127.0.0.1:{server.server_port}"
    )
    yield Hub
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_pushed_model_is_the_saved_folder_with_its_own_card(pipe, saved, expected, hub, tmp_path):
    pipe.push_to_hub("owner/model", private=True, token="hf_x", commit_message="First")
    assert hub.created[0]["name"] == "model"
    assert hub.created[0]["visibility"] == "private"
    for name, content in hub.files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    assert (tmp_path / "README.md").read_text() == (saved / "README.md").read_text()
    assert torch.equal(drawn(LIDiTPipeline.from_pretrained(tmp_path)), expected)


def test_the_cards_fields_are_the_hubs(pipe, saved):
    card = ModelCard.load(saved / "README.md")
    assert "pipeline_tag: text-to-image\n" in str(card.data) + "\n"
    assert card.data.license == "other"
    assert [(result.metric_type, result.metric_value) for result in card.data.eval_results] == [
        ("single", 0.75)
    ]
    entry = pipe.encoders["llama"]
    entry.settings = entry.settings.model_copy(update={"model": "owner/llama", "revision": COMMIT})
    facts = {"license": "apache-2.0", "datasets": ["owner/pictures"], "prompts": ['a "red" circle']}
    card = ModelCard(pipe.card(facts))
    assert card.data.license == "apache-2.0"
    assert card.data.base_model == ["owner/llama"]
    assert card.data.datasets == ["owner/pictures"]
    assert card.data.to_dict()["widget"] == [{"text": 'a "red" circle'}]


def test_the_cards_example_draws(saved, pipe):
    """The lines a reader copies."""
    text = pipe.card({"prompts": ['a "red" circle']})
    code = text.partition("```python\n")[2].partition("```")[0].replace("this/folder", str(saved))
    found: dict[str, Image.Image] = {}
    exec(code, found)
    assert 'pipe("a \\"red\\" circle"' in code
    assert found["image"].size == (24, 16)


# -- the network in fewer bits ---------------------------------------------------------------------


def test_of_a_configuration_of_parts_the_network_s_is_taken(saved):
    eight = BitsAndBytesConfig(load_in_8bit=True)
    assert network_config(PipelineQuantizationConfig(quant_mapping={"model": eight})) is eight
    assert network_config(PipelineQuantizationConfig(quant_mapping={"transformer": eight})) is eight
    assert network_config(eight) is eight
    with pytest.raises(InputError, match="vae: only the network is quantized"):
        LIDiTPipeline.from_pretrained(
            saved,
            quantization_config=PipelineQuantizationConfig(
                quant_mapping={"model": eight, "vae": eight}
            ),
        )
    with pytest.raises(InputError, match="one entry, `model`"):
        network_config(PipelineQuantizationConfig("bitsandbytes_8bit", {"load_in_8bit": True}))
    with pytest.raises((ImportError, RuntimeError), match=r"bitsandbytes|GPU"):
        LIDiTPipeline.from_pretrained(saved, quantization_config=eight)


@pytest.mark.parametrize("kind", ["Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"])
def test_eight_bits_draw_nearly_the_same(saved, expected, kind):
    quantization = pytest.importorskip("torchao.quantization")
    small = LIDiTPipeline.from_pretrained(
        saved,
        dtype=torch.float32,
        quantization_config=TorchAoConfig(getattr(quantization, kind)()),
    )
    linear = [each for each in small.model.modules() if isinstance(each, torch.nn.Linear)]
    assert {type(each.weight).__name__ for each in linear} == {"Int8Tensor"}
    error = (drawn(small) - expected).abs()
    assert 0 < error.mean() < 0.02
