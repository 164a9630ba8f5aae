"""Two real text families of one tiny LLM, as a saved model has them."""

from pathlib import Path

import pytest

from lidit.config import EncoderSettings
from lidit.pipeline.model_encoder import ModelEncoder
from lidit.store import channel_statistics
from lidit.text import PromptEncoder, resolve_encoder
from tests.helpers.tiny_models import tiny_llm

WIDTH = 32


def tiny_encoders(folder: Path) -> dict[str, ModelEncoder]:
    """Layers -2 and -3, loaded; the LLM is in `folder`/llm."""
    model, made = tiny_llm(folder / "llm", "llama", 4, WIDTH), {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LIDIT_CACHE", str(folder / "cache"))
        for name, layer in (("second", -2), ("third", -3)):
            settings = EncoderSettings(
                name=name, model=str(model), layer=layer, dtype="float32", storage="float32"
            )
            loaded = PromptEncoder.load(resolve_encoder(settings))
            prefix, empty = loaded.prefix_states()[1], loaded.empty_states()[1]
            statistics = channel_statistics([prefix, empty])
            spec = loaded.spec
            made[name] = ModelEncoder(
                settings, spec.to_dict(), spec.fingerprint, prefix, empty, *statistics, loaded
            )
    return made
