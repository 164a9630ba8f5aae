"""Public systems whose prompt states no encoder file gives, and why: asked for by name, they are
refused with it.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LeftOut:
    """pipeline: the system's class in diffusers; reason: what an encoder would have to do that none
    does.
    """

    pipeline: str
    reason: str


LEFT_OUT = {
    "anima": LeftOut(
        "AnimaModularPipeline",
        "its conditioner reads the token ids of a second tokenizer beside the states; a family "
        "holds those of its own model alone",
    ),
    "cosmos3": LeftOut(
        "Cosmos3OmniPipeline",
        "its language model is the denoiser itself, so no states of a prompt are a condition",
    ),
    "glm-image": LeftOut(
        "GlmImagePipeline",
        "its condition is the states of all quoted texts of a caption, one text behind the "
        "other, and a language model "
        "draws visual tokens besides; an encoder reads one text per caption",
    ),
    "kandinsky2.1": LeftOut(
        "KandinskyPipeline",
        "its MultilingualCLIP is code of its own; only models that transformers itself has are run",
    ),
    "kolors": LeftOut(
        "KolorsPipeline",
        "its ChatGLM3 is code of its own; only models that transformers itself has are run",
    ),
    "latent-diffusion": LeftOut(
        "LDMTextToImagePipeline",
        "its LDMBert is code of its own; only models that transformers itself has are run",
    ),
    "omnigen": LeftOut(
        "OmniGenPipeline",
        "its language model is the denoiser itself, so no states of a prompt are a condition",
    ),
    "qwen-image-edit": LeftOut(
        "QwenImageEditPipeline",
        "its prompts hold the pictures that are edited; an encoder reads texts alone",
    ),
}
