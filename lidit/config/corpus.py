"""What is computed once per corpus: how sources are read, on which pools, by which codec."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from lidit.config.fields import Place
from lidit.config.settings import Settings


class IngestSettings(Settings):
    """How sources become a corpus (design: the corpus on disk)."""

    unit_samples: int = Field(1024, ge=1, description="most samples in one unit")
    resolution: int = Field(256, ge=8, description="base side of the aspect buckets, pixels")
    bucket_multiple: int = Field(
        16, ge=1, description="bucket sides are multiples of this: codec factor x patch size"
    )
    min_side: int = Field(
        0, ge=0, description="images with a shorter side are quarantined; 0 keeps all"
    )
    min_aesthetic: float | None = Field(
        None, description="the paper keeps 4.7 and above; None keeps all"
    )
    max_aspect: float = Field(4.0, ge=1, description="widest bucket, long side / short side")
    refuse_url_captions: bool = False
    refuse_tag_captions: bool = False
    min_caption_chars: int = Field(1, ge=0)
    max_caption_chars: int = Field(100_000, ge=1)
    class_template: str | None = Field(
        None, description='for class names as captions: "a photo of {class}"'
    )
    class_names: Place | None = Field(
        None, description="text file: one class name per line, or `label name` pairs"
    )
    caption_fields: dict[str, str] = Field(
        {
            "caption": "original",
            "text": "original",
            "synthetic_caption": "synthetic",
            "recaption": "synthetic",
        },
        description="field of a JSON member, row or table that holds a caption -> its origin",
    )
    image_fields: tuple[str, ...] = ("image", "jpg", "png", "image_path", "file_name", "path")
    captions_only: bool = Field(False, description="take captions and leave images where they are")
    unique_keys: Literal["corpus", "file"] = Field(
        "corpus", description="file: keys may start anew in every file"
    )
    max_pixels: int = Field(
        64_000_000, ge=1, description="larger images are refused before they are decoded"
    )


class PoolSettings(Settings):
    """The actors of one job and what each of them gets."""

    actors: int = Field(1, ge=1)
    cpus: float = Field(1, ge=0)
    gpus: float = Field(0, ge=0)
    token_budget: int = Field(8192, ge=1, description="padded tokens in one forward pass")
    resources: dict[str, float] = Field(
        default_factory=dict, description="custom Ray resources of each actor"
    )
    label_selector: dict[str, str] = Field(
        default_factory=dict, description="Ray node labels each actor asks for"
    )
    distinct: bool = Field(
        False, description="embedding computes a caption once that several units hold"
    )


class CodecSettings(Settings):
    """Image <-> latents. `pixels` is the identity on [-1, 1]; everything else is a diffusers
    autoencoder.
    """

    name: str = Field("pixels", pattern=r"^[a-z0-9][a-z0-9_.-]*$")
    model: Place | None = Field(
        None, description="hub id or folder of a diffusers autoencoder; None for pixels"
    )
    revision: str | None = Field(None, pattern=r"^[0-9a-f]{40}$")
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    posterior: Literal["mean", "sample"] = Field(
        "sample",
        description="sample: mean and deviation are stored, and sampled anew in every epoch",
    )
    storage: Literal["float32", "bfloat16"] = Field(
        "float32", description="of latents; pixels are always 8 bits"
    )
    scale: int = Field(
        1, ge=1, le=8, description="buckets of the corpus times this: 2 for twice the resolution"
    )
