"""What a run takes over from the model it starts from or learns from: its shape, its codec, its
states.
"""

from __future__ import annotations

from pathlib import Path

from lidit.config import CodecSettings, ModelSettings
from lidit.config.model import FusionSettings, RefinerSettings
from lidit.data.matching import matching_family
from lidit.errors import InputError
from lidit.models import LIDiT
from lidit.pipeline import LIDiTPipeline
from lidit.store import Corpus, spec_differences


def check_states(model: Path, corpus: Corpus) -> None:
    """Raise InputError unless the corpus holds the very states that the model was trained on."""
    pipe = LIDiTPipeline.from_pretrained(model, check_files=False)
    for name, encoder in pipe.encoders.items():
        family = matching_family(corpus, encoder.settings)
        if family.fingerprint != encoder.fingerprint:
            listed = "\n  ".join(spec_differences(encoder.spec, family.spec))
            raise InputError(
                f"{corpus.folder.location}: the states of encoder {name!r} are not those that "
                f"{model} was trained on "
                f"(trained -> found):\n  {listed}\nuse the model's own corpus, or embed this "
                "one with its encoder"
            )


def codec_of(pipe: LIDiTPipeline) -> CodecSettings:
    """The model's codec, an autoencoder of the model folder by its place there."""
    return pipe.found_codec


def shape_of(model: LIDiT, checkpointing: bool = False) -> ModelSettings:
    """A network's shape as a recipe has it."""
    config = model.config
    return ModelSettings(
        width=config.width,
        depth=config.depth,
        heads=config.heads,
        patch_size=config.patch_size,
        refiner=RefinerSettings(
            depth=config.refiner_depth,
            causal=config.refiner_causal,
            gated=config.refiner_gated,
            mixing=config.refiner_mixing,
        ),
        fusion=FusionSettings(mode=config.fusion_mode, depth=config.fusion_depth),
        visible_tokens=config.visible_tokens,
        layers=config.layers,
        activation_checkpointing=checkpointing,
    )
