"""Images to latents and back: the codecs LI-DiT's latents come from, and how one is trained."""

from lidit.codecs.codec import (
    CLASSES,
    AutoencoderCodec,
    Codec,
    Encoded,
    PixelCodec,
    codec_spec,
    load_codec,
)

__all__ = [
    "CLASSES",
    "AutoencoderCodec",
    "Codec",
    "Encoded",
    "PixelCodec",
    "codec_spec",
    "load_codec",
]
