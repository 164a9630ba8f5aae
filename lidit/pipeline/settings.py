"""How a saved model samples: what its folder says besides the weights."""

from __future__ import annotations

from dataclasses import dataclass, field

from lidit.config import CodecSettings, ObjectiveSettings, SamplerSettings


@dataclass(frozen=True)
class PipelineSettings:
    """The settings a pipeline is built with; `height` and `width` are the training
    size in pixels.
    """

    objective: ObjectiveSettings = field(default_factory=ObjectiveSettings)
    sampler: SamplerSettings = field(default_factory=SamplerSettings)
    codec: CodecSettings = field(default_factory=CodecSettings)
    height: int = 256
    width: int = 256
