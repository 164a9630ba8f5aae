"""Encoders of public systems name the weights that those systems' pipelines say they read."""

import re

import diffusers
import pytest

from lidit.config.shipped import ENCODERS, load_encoder_settings
from tests.helpers.public_systems import SYSTEMS

# of encoders without a condition section, which names the pipeline
PIPELINES = {
    "auraflow": "AuraFlowPipeline",
    "chroma": "ChromaPipeline",
    "dreamlite": "DreamLitePipeline",
    "fibo": "BriaFiboPipeline",
    "fibo-layers": "BriaFiboPipeline",
    "hidream-clip": "HiDreamImagePipeline",
    "ideogram4": "Ideogram4Pipeline",
    "kandinsky2.2": "KandinskyV22PriorPipeline",
    "kandinsky5": "Kandinsky5T2IPipeline",
    "ltx-video": "LTXPipeline",
    "minimax-h3": "MiniMaxH3ModularPipeline",
    "sd3-clip-g": "StableDiffusion3Pipeline",
    "sd3-clip-l": "StableDiffusion3Pipeline",
    "sd3-t5": "StableDiffusion3Pipeline",
    "sdxl-clip-g": "StableDiffusionXLPipeline",
    "sdxl-clip-l": "StableDiffusionXLPipeline",
}
# of pipelines with several text encoders, where it is not the first
PARTS = {
    "flux1-t5": "text_encoder_2",
    "hidream-llama": "text_encoder_4",
    "hidream-t5": "text_encoder_3",
    "hunyuan-dit-t5": "text_encoder_2",
    "hunyuan-image-glyphs": "text_encoder_2",
    "sd3-clip-g": "text_encoder_2",
    "sd3-t5": "text_encoder_3",
    "sdxl-clip-g": "text_encoder_2",
}
# a folder of PixArt's repository holds a copy of these weights
COPIES = {"PixArt-alpha/PixArt-alpha": "google/t5-v1_1-xxl"}
# encoders whose pipeline links other weights, and why
EXCEPTIONS = {
    "cosmos-predict2.5": "the link is to the architecture; NVIDIA trained it further as Reason1",
    "hunyuan-dit-bert": "the line is Stable Diffusion's, and goes on with a fine-tuned CLIP",
    "ltx2": "the lines are LTX-Video's; the pipeline itself asks for a Gemma 3",
    "sd2": "the class is Stable Diffusion 1's too, whose CLIP its line links",
}


def linked(name: str) -> set[str]:
    """Hub ids that the pipeline's documentation links where it says what its text encoder is."""
    condition = load_encoder_settings(name).condition
    pipeline = getattr(diffusers, PIPELINES[name] if condition is None else condition.pipeline)
    part = PARTS.get(name, "text_encoder")
    entry = re.search(rf"^( +){part} \(.*\n((?:\1 +.*\n)+)", pipeline.__doc__ or "", re.MULTILINE)
    found = re.findall(r"huggingface\.co/([\w.-]+/[\w.-]*\w)", entry[0] if entry else "")
    return {COPIES.get(hub, hub) for hub in found if not hub.startswith("docs/")}


@pytest.mark.parametrize("name", SYSTEMS)
def test_it_names_what_its_pipeline_links(name: str) -> None:
    found = linked(name)
    if len(found) == 1:
        assert ({load_encoder_settings(name).model} == found) == (name not in EXCEPTIONS)
    else:
        assert name not in EXCEPTIONS


def test_most_pipelines_link_their_weights() -> None:
    assert len([name for name in SYSTEMS if linked(name)]) > 35


def test_every_encoder_without_a_condition_has_its_pipeline_here() -> None:
    without = {
        path.stem
        for path in ENCODERS.glob("*.yaml")
        if path.stem in SYSTEMS and load_encoder_settings(path.stem).condition is None
    }
    assert without == set(PIPELINES)
