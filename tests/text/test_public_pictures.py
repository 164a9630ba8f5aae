"""A public pipeline draws the same picture from stored states as from text."""

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler

from lidit.config.shipped import load_encoder_settings
from lidit.store import Corpus, TextFamily
from lidit.text import PromptEncoder, resolve_encoder
from tests.helpers import public_models as tiny
from tests.helpers.corpus_factory import make_corpus
from tests.text.test_embedding import embed

CAPTIONS = ["a red circle", "a blue square on a green field"]
SIZE = {
    "sample_size": 32,
    "block_out_channels": (4,),
    "layers_per_block": 1,
    "latent_channels": 1,
    "norm_num_groups": 1,
}
BARE = {"use_quant_conv": False, "use_post_quant_conv": False}


def stored(folder: Path, name: str, model: Any, tokens: Any) -> TextFamily:
    saved = tiny.saved(folder / name, model, tokens)
    settings = load_encoder_settings(name, [f"model={saved}", "dtype=float32", "storage=float32"])
    encoder = PromptEncoder.load(resolve_encoder(settings, "cpu"), "cpu")
    if not (folder / "corpus").exists():
        make_corpus(folder / "corpus", [CAPTIONS])
    embed(Corpus.open(folder / "corpus"), encoder, {"encoder": settings.model_dump(mode="json")})
    return Corpus.open(folder / "corpus").text_family(name)


def drawn(pipe: Any, **condition: Any) -> np.ndarray:
    options = {
        "height": 32,
        "width": 32,
        "num_inference_steps": 2,
        "guidance_scale": 1.0,
        "output_type": "pil",
    }
    pipe.set_progress_bar_config(disable=True)
    image = pipe(**condition, **options, generator=torch.Generator().manual_seed(0)).images[0]
    return np.asarray(image)


@pytest.mark.slow
def test_flux1_from_two_families(tmp_path: Path) -> None:
    torch.manual_seed(0)
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=tiny.WIDTH, pooled_projection_dim=tiny.WIDTH, axes_dims_rope=[4, 4, 8],
    )  # fmt: skip
    parts = {
        "clip-l": (tiny.clip_text(projected=False), tiny.clip()),
        "flux1-t5": (tiny.t5_encoder(), tiny.t5()),
    }
    vae = AutoencoderKL(**SIZE, **BARE, shift_factor=0.1)
    texts = (*parts["clip-l"], *parts["flux1-t5"])
    pipe = diffusers.FluxPipeline(
        FlowMatchEulerDiscreteScheduler(), vae, *texts, tiny.lively(transformer)
    )
    families = [stored(tmp_path, name, model, tokens) for name, (model, tokens) in parts.items()]
    pictures = []
    for row, caption in enumerate(CAPTIONS):
        condition = {
            name: value
            for family in families
            for name, value in family.prompt_embeds(0, [row]).items()
        }
        assert set(condition) == {"prompt_embeds", "pooled_prompt_embeds"}
        pictures.append(drawn(pipe, **condition))
        assert np.array_equal(pictures[-1], drawn(pipe, prompt=caption))
    assert not np.array_equal(*pictures)


@pytest.mark.slow
def test_flux2_klein_with_its_padding(tmp_path: Path) -> None:
    torch.manual_seed(0)
    transformer = diffusers.Flux2Transformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=3 * tiny.WIDTH, timestep_guidance_channels=256, axes_dims_rope=[4, 4, 4,
                                                                                            4],
        guidance_embeds=False,
    )  # fmt: skip
    model, tokens = tiny.decoder("qwen3", 30), tiny.qwen(tiny.QWEN3)
    vae = AutoencoderKLFlux2(
        **SIZE,
        **BARE,
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
    )
    pipe = diffusers.Flux2KleinPipeline(
        FlowMatchEulerDiscreteScheduler(),
        vae,
        model,
        tokens,
        tiny.lively(transformer),
        is_distilled=True,
    )
    family = stored(tmp_path, "flux2-klein", model, tokens)
    pictures = [drawn(pipe, **family.prompt_embeds(0, [row])) for row in range(len(CAPTIONS))]
    for picture, caption in zip(pictures, CAPTIONS, strict=True):
        assert np.array_equal(picture, drawn(pipe, prompt=caption))
    assert not np.array_equal(*pictures)
