"""A trained model's folder with small random LLMs, and the pipeline that is loaded from it."""

import pytest

from lidit.config import CodecSettings, EncoderSettings, ObjectiveSettings, SamplerSettings
from lidit.pipeline import LIDiTPipeline, PipelineSettings, save_pipeline
from lidit.pipeline.model_encoder import ModelEncoder
from lidit.store import channel_statistics
from lidit.text import PromptEncoder, resolve_encoder
from tests.helpers.prompts import PROMPTS
from tests.helpers.served_model import random_network
from tests.helpers.tiny_models import tiny_llm


@pytest.fixture(scope="package")
def llms(tmp_path_factory):
    """Two random language models of other families, widths and storage dtypes."""
    root = tmp_path_factory.mktemp("llms")
    with pytest.MonkeyPatch.context() as patch:
        # remembers file digests of models that live for one test
        patch.setenv("LIDIT_CACHE", str(root / "cache"))
        yield [
            EncoderSettings(
                name=name, model=str(tiny_llm(root / name, family, 4, width)), storage=storage
            )
            for name, family, width, storage in (
                ("llama", "llama", 32, "bfloat16"),
                ("qwen", "qwen2", 48, "int8"),
            )
        ]


def trained_on(settings):
    """What training holds of one LLM, computed from the LLM itself."""
    spec = resolve_encoder(settings)
    encoder = PromptEncoder.load(spec)
    states = [caption.states for caption in encoder.encode(PROMPTS)]
    mean, deviation = channel_statistics(states)
    fixed = settings.model_copy(update={"dtype": spec.dtype, "storage": spec.storage})
    return ModelEncoder(
        fixed,
        spec.to_dict(),
        spec.fingerprint,
        encoder.prefix_states()[1],
        encoder.empty_states()[1],
        mean,
        deviation,
        token_ids=(encoder.tokenizer.prefix_ids, encoder.tokenizer.empty_ids),
    )


@pytest.fixture(scope="package")
def saved(llms, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "folder"
    encoders = [trained_on(settings) for settings in llms]
    model = random_network(encoders)
    save_pipeline(
        folder,
        model,
        encoders,
        PipelineSettings(
            ObjectiveSettings(kind="clean"),
            SamplerSettings(steps=3, guidance_scale=2.0),
            CodecSettings(),
            height=16,
            width=24,
        ),
        {"corpus": "0123abcd", "scores": {"single": 0.75}},
    )
    return folder


@pytest.fixture
def pipe(saved):
    pipeline = LIDiTPipeline.from_pretrained(saved)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
