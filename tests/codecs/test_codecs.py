"""Codecs: the latents are those of the diffusers model, scaled by its factors, and decode brings
the image back.
"""

import json
from pathlib import Path

import diffusers
import pytest
import torch

from lidit.codecs import CLASSES, codec_spec, load_codec
from lidit.config import CodecSettings
from lidit.errors import InputError
from tests.helpers.tiny_codecs import save_codec

PIXELS = torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_pixels_are_the_identity() -> None:
    codec = load_codec(CodecSettings())
    encoded = codec.encode(PIXELS)
    assert torch.equal(encoded.mean, PIXELS)
    assert encoded.deviation is None
    assert torch.allclose(codec.decode(encoded.mean), (PIXELS + 1) / 2)
    assert codec.decode(torch.tensor([[[[-3.0]], [[0.0]], [[3.0]]]])).flatten().tolist() == [
        0.0,
        0.5,
        1.0,
    ]


@pytest.mark.parametrize("kind", CLASSES)
def test_latents_are_those_of_diffusers(tmp_path: Path, kind: str) -> None:
    settings = CodecSettings(name="x", model=str(save_codec(tmp_path, kind)))
    codec = load_codec(settings)
    model = getattr(diffusers, kind).from_pretrained(str(tmp_path)).eval()
    encoded = codec.encode(PIXELS)
    with torch.no_grad():
        found = model.encode(PIXELS)
        if kind == "AutoencoderKL":
            expected = (found.latent_dist.mode() - 0.25) * 0.5
            assert torch.allclose(encoded.deviation, found.latent_dist.std * 0.5, atol=1e-6)
            decoded = model.decode(expected / 0.5 + 0.25).sample
        elif kind == "AutoencoderTiny":
            expected, decoded = found.latents, model.decode(found.latents).sample
        else:
            expected, decoded = found.latent * 0.4, model.decode(found.latent).sample
    assert torch.allclose(encoded.mean, expected, atol=1e-6)
    assert encoded.mean.shape == (2, codec.channels, 16 // codec.factor, 24 // codec.factor)
    assert torch.allclose(codec.decode(encoded.mean), ((decoded + 1) / 2).clamp(0, 1), atol=1e-5)
    spec = codec_spec(settings)
    assert (spec["factor"], spec["channels"]) == (codec.factor, codec.channels)
    assert spec["posterior"] == (kind == "AutoencoderKL")


def test_mean_only_stores_no_deviation(tmp_path: Path) -> None:
    settings = CodecSettings(
        name="x", model=str(save_codec(tmp_path, "AutoencoderKL")), posterior="mean"
    )
    assert load_codec(settings).encode(PIXELS).deviation is None


def test_spec_changes_with_what_determines_the_latents(tmp_path: Path) -> None:
    one = codec_spec(
        CodecSettings(name="x", model=str(save_codec(tmp_path / "a", "AutoencoderKL")))
    )
    same = codec_spec(
        CodecSettings(name="y", model=str(save_codec(tmp_path / "b", "AutoencoderKL")))
    )
    other = codec_spec(
        CodecSettings(name="x", model=str(save_codec(tmp_path / "c", "AutoencoderKL", seed=1)))
    )
    assert one == same
    assert {key for key in one if one[key] != other[key]} == {"weights_sha256"}
    assert codec_spec(CodecSettings(), "cuda") == codec_spec(CodecSettings(), "cpu")


def test_vae_of_a_whole_pipeline_is_found(tmp_path: Path) -> None:
    save_codec(tmp_path / "vae", "AutoencoderKL")
    assert load_codec(CodecSettings(name="x", model=str(tmp_path))).factor == 2


def test_what_is_no_codec_is_named(tmp_path: Path) -> None:
    def settings(model: Path | str) -> CodecSettings:
        return CodecSettings(name="x", model=str(model))

    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text(json.dumps({"_class_name": "UNet2DModel"}))
    save_codec(tmp_path / "pickled", "AutoencoderKL")
    weights = next((tmp_path / "pickled").glob("*.safetensors"))
    weights.rename(weights.with_suffix(".bin"))
    for model, message in (
        (tmp_path / "absent", "no such folder"),
        (tmp_path / "empty", "no config.json"),
        (tmp_path / "other", "a UNet2DModel is no codec"),
        (tmp_path / "pickled", "no \\*.safetensors"),
        ("owner/name", "set codec.revision"),
    ):
        with pytest.raises(InputError, match=message):
            codec_spec(settings(model))
        with pytest.raises(InputError, match=message):
            load_codec(settings(model))
