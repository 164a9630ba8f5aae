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
    "joyimage": LeftOut(
        "JoyImageEditPipeline",
        "it edits, and its prompts then hold the pictures; an encoder reads texts alone",
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
    "prx-pixel": LeftOut(
        "PRXPixelPipeline",
        "no public page says which Qwen3-VL it reads; a file of one's own with its folder as model "
        "and template '{}' does what it asks",
    ),
    "qwen-image-edit": LeftOut(
        "QwenImageEditPipeline",
        "its prompts hold the pictures that are edited; an encoder reads texts alone",
    ),
    "sana-wm": LeftOut(
        "SanaWMPipeline",
        "it goes on from a first frame along a camera's path, of which a corpus of captions has "
        "neither; sana.yaml with another template reads its prompts",
    ),
}
