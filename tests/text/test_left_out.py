"""Systems that are left out: asked for by name each is refused in one line, and its
reason holds.
"""

import importlib
import inspect
from pathlib import Path

import diffusers
import pytest
import torch
import transformers
from diffusers.pipelines.kolors.text_encoder import ChatGLMConfig

from lidit.config import EncoderSettings
from lidit.config.left_out import LEFT_OUT
from lidit.config.shipped import ENCODERS
from lidit.errors import InputError
from lidit.text import resolve_encoder
from tests.helpers import public_models as tiny
from tests.helpers.command import lidit
from tests.helpers.corpus_factory import make_corpus
from tests.helpers.public_pipelines import bare


@pytest.mark.parametrize("name", LEFT_OUT)
def test_it_is_refused_with_its_reason(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_corpus(tmp_path / "corpus", [["a"]])
    assert lidit("embed", tmp_path / "corpus", "--encoder", name) == 2
    told = capsys.readouterr().err.strip()
    assert told.startswith(f"error: {name}: left out, because {LEFT_OUT[name].reason}; ")
    assert "\n" not in told
    assert hasattr(diffusers, LEFT_OUT[name].pipeline)
    assert not (ENCODERS / f"{name}.yaml").exists()


def test_kolors_has_a_model_that_transformers_lacks(tmp_path: Path) -> None:
    ChatGLMConfig().save_pretrained(tmp_path)
    with pytest.raises(
        InputError,
        match=r"cannot read this config.json .* code that comes with a model is never " r"run",
    ):
        resolve_encoder(EncoderSettings(name="kolors", model=str(tmp_path)), "cpu")


@torch.no_grad()
def test_glm_image_reads_several_texts_of_a_caption() -> None:
    pipe = bare("GlmImagePipeline", text_encoder=tiny.t5_encoder(words=384), tokenizer=tiny.byt5())
    alone = [pipe._get_glyph_embeds([f'a sign "{text}"']).shape[1] for text in ("stop", "go")]
    assert pipe._get_glyph_embeds(['signs "stop" and "go"']).shape[1] > max(alone)


def test_prompts_of_an_editor_hold_pictures() -> None:
    assert "image" in inspect.signature(diffusers.QwenImageEditPipeline.encode_prompt).parameters


@pytest.mark.parametrize("name", ["omnigen", "cosmos3"])
def test_a_denoiser_that_reads_prompts_has_no_text_encoder(name: str) -> None:
    kind = getattr(diffusers, LEFT_OUT[name].pipeline)
    parts = inspect.signature(kind.__init__).parameters
    assert "transformer" in parts
    assert not [part for part in parts if "text_encoder" in part]


@pytest.mark.parametrize(
    ("name", "model"), [("kandinsky2.1", "MultilingualCLIP"), ("latent-diffusion", "LDMBertModel")]
)
def test_a_text_encoder_is_code_of_diffusers(name: str, model: str) -> None:
    module = importlib.import_module(getattr(diffusers, LEFT_OUT[name].pipeline).__module__)
    assert getattr(module, model).__module__.startswith("diffusers.")
    assert not hasattr(transformers, model)


def test_anima_reads_token_ids_of_a_second_tokenizer() -> None:
    steps = importlib.import_module("diffusers.modular_pipelines.anima.encoders")
    given = {output.name for output in steps.AnimaTextEncoderStep().intermediate_outputs}
    assert {"qwen_prompt_embeds", "t5_input_ids"} <= given
