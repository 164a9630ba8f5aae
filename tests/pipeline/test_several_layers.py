"""A published model that reads several layers of its LLM: drawn from text, from stored states, and
loaded again.
"""

import numpy as np
import pytest
import torch

from lidit.config import (
    CodecSettings,
    EncoderSettings,
    ModelSettings,
    ObjectiveSettings,
    SamplerSettings,
)
from lidit.errors import InputError
from lidit.models import LIDiT
from lidit.pipeline import LIDiTPipeline, PipelineSettings, save_pipeline
from tests.helpers.prompts import PROMPTS
from tests.helpers.tiny_models import tiny_llm
from tests.pipeline.conftest import trained_on


@pytest.mark.parametrize("kind", ["learned", "per_block"])
def test_it_draws_the_same_from_text_and_from_states(kind, tmp_path, monkeypatch):
    monkeypatch.setenv("LIDIT_CACHE", str(tmp_path / "cache"))
    llm = EncoderSettings(
        name="llm",
        model=str(tiny_llm(tmp_path / "llm", "llama", 4, 32)),
        layers=(1, 2, 4),
        join="separate",
    )
    encoder = trained_on(llm)
    assert len(encoder.mean) == 3 * 32
    shape = ModelSettings.model_validate(
        {"width": 32, "depth": 2, "heads": 4, "patch_size": 4, "layers": kind}
    )
    torch.manual_seed(0)
    model = LIDiT.from_settings(shape, {"llm": 96}, 3, {"llm": 3}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.conditioner.set_statistics("llm", encoder.mean, encoder.deviation)
    settings = PipelineSettings(
        ObjectiveSettings(kind="clean"),
        SamplerSettings(steps=3, guidance_scale=2.0),
        CodecSettings(),
        16,
        16,
    )
    save_pipeline(tmp_path / "model", model, [encoder], settings, {})
    pipe = LIDiTPipeline.from_pretrained(tmp_path / "model")
    pipe.set_progress_bar_config(disable=True)
    drawn = pipe(PROMPTS, seed=0, output_type="np").images
    assert not np.array_equal(drawn[0], drawn[1])
    again = LIDiTPipeline.from_pretrained(tmp_path / "model")
    again.set_progress_bar_config(disable=True)
    # Guidance needs the empty caption's states, which the folder has.
    np.testing.assert_array_equal(
        again(states=pipe.encode_prompts(PROMPTS), seed=0, output_type="np").images, drawn
    )
    assert again.encoders["llm"].loaded is None
    other = tiny_llm(tmp_path / "other", "llama", 4, 32, seed=3)
    with pytest.raises(InputError, match="is not what the model was trained with"):
        LIDiTPipeline.from_pretrained(tmp_path / "model", encoders={"llm": str(other)})(PROMPTS[0])
