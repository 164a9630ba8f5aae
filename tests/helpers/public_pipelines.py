"""What the pipelines of public systems make of captions: each asked in its own words, around tiny
models.
"""

import importlib
import inspect
import sys
from types import SimpleNamespace
from typing import Any

import diffusers
import torch

from lidit.text import PromptEncoder
from tests.helpers import public_models as tiny

# what the pipeline's call takes, by name; "mask" where another name has no mask of its own
Answer = dict[str, Any]


def bare(name: str, **parts: Any) -> Any:
    """A pipeline of diffusers with its text parts alone."""
    kind = getattr(diffusers, name)
    wanted = inspect.signature(kind.__init__).parameters
    return kind(
        **{
            part: parts.get(part)
            for part, about in wanted.items()
            if part in parts or (part != "self" and about.default is about.empty)
        }
    )


def prefix(encoder: PromptEncoder) -> int:
    return len(encoder.tokenizer.prefix_ids)


# -- what each pipeline is asked -------------------------------------------------------------------


def qwen_image(model: Any, tokens: Any, encoder: PromptEncoder, captions: list[str]) -> Answer:
    pipe = bare("QwenImagePipeline", text_encoder=model, tokenizer=tokens)
    pipe.prompt_template_encode_start_idx = prefix(encoder)
    states, mask = pipe.encode_prompt(captions, device="cpu")
    return {"prompt_embeds": states, "prompt_embeds_mask": mask}


def qwen_image_21(model: Any, tokens: Any, encoder: PromptEncoder, captions: list[str]) -> Answer:
    pipe = bare("QwenImage21Pipeline", text_encoder=model, processor=tiny.Processor(tokens))
    states, mask, _ = pipe.encode_prompt(captions, device="cpu")
    return {"prompt_embeds": states, "prompt_embeds_mask": mask}


def dreamlite(model: Any, tokens: Any, encoder: PromptEncoder, captions: list[str]) -> Answer:
    pipe = bare("DreamLitePipeline", text_encoder=model, tokenizer=tokens)
    pipe.prompt_template_encode_generate_start_idx = prefix(encoder)
    states, mask = pipe.encode_prompt("generate", captions, torch.device("cpu"), torch.float32)
    return {"states": states, "mask": mask}


def flux2_klein(model: Any, tokens: Any, encoder: PromptEncoder, captions: list[str]) -> Answer:
    pipe = bare("Flux2KleinPipeline", text_encoder=model, tokenizer=tokens)
    states, _ = pipe.encode_prompt(
        captions, device="cpu", max_sequence_length=encoder.spec.max_tokens
    )
    return {"prompt_embeds": states}


def flux2_dev(model: Any, tokens: Any, encoder: PromptEncoder, captions: list[str]) -> Answer:
    pipe = bare("Flux2Pipeline", text_encoder=model, tokenizer=tokens)
    states, _ = pipe.encode_prompt(
        captions, device="cpu", max_sequence_length=encoder.spec.max_tokens
    )
    return {"prompt_embeds": states}


def flux3(model: Any, tokens: Any, encoder: PromptEncoder, captions: list[str]) -> Answer:
    """One caption, as its step takes them."""
    steps = importlib.import_module("diffusers.modular_pipelines.flux3.encoders")
    embeds = steps.Flux3TextEncoderStep._get_qwen3_vl_prompt_embeds
    return {"prompt_embeds": embeds(model, tiny.Processor(tokens), *captions)}


def minimax_h3(model: Any, tokens: Any, encoder: PromptEncoder, captions: list[str]) -> Answer:
    """One caption, as its step takes them, which has no words for none."""
    steps = importlib.import_module("diffusers.modular_pipelines.minimax_h3.encoders")
    ids = tokens(*captions, add_special_tokens=False)["input_ids"] or [tokens.eos_token_id]
    texts = SimpleNamespace(create_mm_token_type_ids=lambda rows: [[0] * len(row) for row in rows])
    return {"states": steps.get_qwen3vl_prompt_embeds(model, texts, ids)}


def krea2(model: Any, tokens: Any, encoder: PromptEncoder, captions: list[str]) -> Answer:
    """The pipeline puts the suffix behind the padding; no token's place counts there, so here
    padding comes last.
    """
    pipe = bare("Krea2Pipeline", text_encoder=model, tokenizer=tokens)
    pipe.prompt_template_encode_start_idx = prefix(encoder)
    pipe.prompt_template_encode_num_suffix_tokens = suffix = len(encoder.tokenizer.suffix_ids)
    states, mask = pipe.encode_prompt(
        captions, device="cpu", max_sequence_length=encoder.spec.max_tokens + suffix
    )
    order = torch.argsort((~mask).long(), dim=1, stable=True)
    moved = torch.take_along_dim(states, order[:, :, None, None], dim=1)
    longest = int(mask.sum(1).max())
    return {
        "prompt_embeds": moved[:, :longest],
        "prompt_embeds_mask": mask.sort(descending=True)[0][:, :longest],
    }


def ideogram4(model: Any, tokens: Any, encoder: PromptEncoder, captions: list[str]) -> Answer:
    pipe = bare("Ideogram4Pipeline", text_encoder=model, tokenizer=tokens)
    longest = 200
    states = pipe.encode_prompt(captions, 1, 1, longest, torch.device("cpu"))[0]
    return {"prompt_embeds": states[:, :longest]}


def hunyuan_image(model: Any, tokens: Any, encoder: PromptEncoder, captions: list[str]) -> Answer:
    pipe = bare("HunyuanImagePipeline", text_encoder=model, tokenizer=tokens)
    length = encoder.spec.max_tokens
    states, mask = pipe._get_qwen_prompt_embeds(
        tokens, model, captions, tokenizer_max_length=length, drop_idx=prefix(encoder)
    )
    return {"prompt_embeds": states, "prompt_embeds_mask": mask}


def hunyuan_image_glyphs(
    model: Any, tokens: Any, encoder: PromptEncoder, captions: list[str]
) -> Answer:
    pipe = bare("HunyuanImagePipeline", text_encoder_2=model, tokenizer_2=tokens)
    nothing = torch.zeros(len(captions), 1, 8)
    found = pipe.encode_prompt(
        captions,
        "cpu",
        batch_size=len(captions),
        prompt_embeds=nothing,
        prompt_embeds_mask=nothing[..., 0],
    )
    return {"prompt_embeds_2": found[2], "prompt_embeds_mask_2": found[3]}


def hunyuan_video(model: Any, tokens: Any, encoder: PromptEncoder, captions: list[str]) -> Answer:
    from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE

    pipe = bare("HunyuanVideoPipeline", text_encoder=model, tokenizer=tokens)
    template = {**DEFAULT_PROMPT_TEMPLATE, "crop_start": prefix(encoder)}
    states, mask = pipe._get_llama_prompt_embeds(
        captions, template, max_sequence_length=encoder.spec.max_tokens
    )
    return {"prompt_embeds": states, "prompt_attention_mask": mask}


def hunyuan_video_15(
    model: Any, tokens: Any, encoder: PromptEncoder, captions: list[str]
) -> Answer:
    kind = diffusers.HunyuanVideo15Pipeline
    states, mask = kind._get_mllm_prompt_embeds(
        model,
        tokens,
        captions,
        torch.device("cpu"),
        encoder.spec.max_tokens,
        crop_start=prefix(encoder),
    )
    return {"prompt_embeds": states, "prompt_embeds_mask": mask}


def kandinsky5(model: Any, tokens: Any, encoder: PromptEncoder, captions: list[str]) -> Answer:
    """Padding stands behind the text and is not masked; the pipeline's lengths say
    where it begins.
    """
    from diffusers.pipelines.kandinsky5.pipeline_kandinsky_t2i import prompt_clean

    pipe = bare("Kandinsky5T2IPipeline", text_encoder=model, tokenizer=tiny.Processor(tokens))
    pipe.prompt_template_encode_start_idx = prefix(encoder)
    states, ends = pipe._encode_prompt_qwen([prompt_clean(caption) for caption in captions], "cpu")
    mask = torch.arange(states.shape[1]) < ends.diff()[:, None]
    return {"prompt_embeds_qwen": states, "mask": mask}


def kandinsky6(model: Any, tokens: Any, encoder: PromptEncoder, captions: list[str]) -> Answer:
    from diffusers.pipelines.kandinsky6 import pipeline_kandinsky6_ti2va as module

    crop, module._QWEN_CROP_START = module._QWEN_CROP_START, prefix(encoder)
    vectors = (tiny.clip(), tiny.clip_text(projected=False))
    try:
        found = module.Kandinsky6TI2VAPipeline._get_prompt_embeds(
            captions,
            tiny.Processor(tokens),
            model,
            *vectors,
            encoder.spec.max_tokens,
            torch.device("cpu"),
        )
    finally:
        module._QWEN_CROP_START = crop
    return {"prompt_embeds": found[0], "prompt_attention_mask": found[2]}


def longcat(model: Any, tokens: Any, encoder: PromptEncoder, captions: list[str]) -> Answer:
    pipe = bare("LongCatImagePipeline", text_encoder=model, tokenizer=tokens)
    pipe.tokenizer_max_length = encoder.spec.max_tokens
    return {"prompt_embeds": pipe.encode_prompt(captions)[0]}


def z_image(model: Any, tokens: Any, encoder: PromptEncoder, captions: list[str]) -> Answer:
    pipe = bare("ZImagePipeline", text_encoder=model, tokenizer=tokens)
    return {
        "prompt_embeds": pipe._encode_prompt(
            list(captions), max_sequence_length=encoder.spec.max_tokens
        )
    }


def ovis(model: Any, tokens: Any, encoder: PromptEncoder, captions: list[str]) -> Answer:
    pipe = bare("OvisImagePipeline", text_encoder=model, tokenizer=tokens)
    pipe.user_prompt_begin_id = prefix(encoder)
    return {"prompt_embeds": pipe._get_ovis_prompt_embeds(captions)}


def nucleus(model: Any, tokens: Any, encoder: PromptEncoder, captions: list[str]) -> Answer:
    pipe = bare("NucleusMoEImagePipeline", text_encoder=model, processor=tiny.Processor(tokens))
    states, mask = pipe.encode_prompt(captions, max_sequence_length=encoder.spec.max_tokens)
    assert states.shape[1] % 8 == 0
    mask = torch.ones(states.shape[:2], dtype=torch.int64) if mask is None else mask
    longest = int(mask.sum(1).max())  # the mask hides what makes it a multiple of 8
    cut = mask[:, :longest]
    return {"prompt_embeds": states[:, :longest], "prompt_embeds_mask": None if cut.all() else cut}


def ernie(model: Any, tokens: Any, encoder: PromptEncoder, captions: list[str]) -> Answer:
    pipe = bare("ErnieImagePipeline", text_encoder=model, tokenizer=tokens)
    return {"prompt_embeds": pipe.encode_prompt(captions, torch.device("cpu"))}


def cogview4(model: Any, tokens: Any, encoder: PromptEncoder, captions: list[str]) -> Answer:
    pipe = bare("CogView4Pipeline", text_encoder=model, tokenizer=tokens)
    return {"prompt_embeds": pipe._get_glm_embeds(captions)}


def lumina2(model: Any, tokens: Any, encoder: PromptEncoder, captions: list[str]) -> Answer:
    pipe = bare("Lumina2Pipeline", text_encoder=model, tokenizer=tokens)
    states, mask, *_ = pipe.encode_prompt(
        captions, False, device="cpu", max_sequence_length=encoder.spec.max_tokens
    )
    return {"prompt_embeds": states, "prompt_attention_mask": mask}


def sana(model: Any, tokens: Any, encoder: PromptEncoder, captions: list[str]) -> Answer:
    pipe = bare("SanaPipeline", text_encoder=model, tokenizer=tokens)
    call = inspect.signature(pipe.__call__).parameters
    instruction = call["complex_human_instruction"].default
    states, mask, *_ = pipe.encode_prompt(
        captions, False, device="cpu", complex_human_instruction=instruction
    )
    return {"prompt_embeds": states, "prompt_attention_mask": mask}


def sana_video(model: Any, tokens: Any, encoder: PromptEncoder, captions: list[str]) -> Answer:
    pipe = bare("SanaVideoPipeline", text_encoder=model, tokenizer=tokens)
    call = inspect.signature(pipe.__call__).parameters
    instruction = call["complex_human_instruction"].default
    states, mask, *_ = pipe.encode_prompt(
        captions, False, device="cpu", complex_human_instruction=instruction
    )
    return {"prompt_embeds": states, "prompt_attention_mask": mask}


def easyanimate(model: Any, tokens: Any, encoder: PromptEncoder, captions: list[str]) -> Answer:
    """The mask has to be given to the call, but no transformer reads it: every state counts."""
    forward = diffusers.EasyAnimateTransformer3DModel.forward
    assert not [name for name in inspect.signature(forward).parameters if "mask" in name]
    pipe = bare("EasyAnimatePipeline", text_encoder=model, tokenizer=tokens)
    states, _, mask, _ = pipe.encode_prompt(captions, do_classifier_free_guidance=False)
    return {"prompt_embeds": states, "prompt_attention_mask": torch.ones_like(mask)}


def hidream_llama(model: Any, tokens: Any, encoder: PromptEncoder, captions: list[str]) -> Answer:
    pipe = bare("HiDreamImagePipeline", text_encoder_4=model, tokenizer_4=tokens)
    return {"prompt_embeds_llama3": pipe._get_llama3_prompt_embeds(captions)}


def hidream_t5(model: Any, tokens: Any, encoder: PromptEncoder, captions: list[str]) -> Answer:
    pipe = bare("HiDreamImagePipeline", text_encoder_3=model, tokenizer_3=tokens)
    return {"prompt_embeds_t5": pipe._get_t5_prompt_embeds(captions)}


def hidream_clip(model: Any, tokens: Any, encoder: PromptEncoder, captions: list[str]) -> Answer:
    pipe = bare("HiDreamImagePipeline", text_encoder=model, tokenizer=tokens)
    return {"pooled": pipe._get_clip_prompt_embeds(tokens, model, captions)}


def fibo(model: Any, tokens: Any, encoder: PromptEncoder, captions: list[str]) -> Answer:
    pipe = bare("BriaFiboPipeline", text_encoder=model, tokenizer=tokens)
    states, layers, mask = pipe.get_prompt_embeds(captions)
    if len(encoder.spec.layers) > 2:
        states = torch.stack(layers, dim=2)
    return {"states": states, "mask": mask}


def fibo2(model: Any, tokens: Any, encoder: PromptEncoder, captions: list[str]) -> Answer:
    pipe = bare("BriaFibo2Pipeline", text_encoder=model, processor=tiny.Processor(tokens))
    states, mask = pipe.encode_prompt(captions)
    return {"prompt_embeds": states, "prompt_embeds_mask": mask}


def cosmos25(model: Any, tokens: Any, encoder: PromptEncoder, captions: list[str]) -> Answer:
    vae = torch.nn.Identity()  # of which the pipeline wants numbers
    vae.config, vae.temperal_downsample = (
        SimpleNamespace(latents_mean=[0.0], latents_std=[1.0], z_dim=1),
        [True],
    )
    parts = {"text_encoder": model, "tokenizer": tokens, "safety_checker": tokens, "vae": vae}
    pipe = bare("Cosmos2_5_PredictBasePipeline", **parts)
    return {"prompt_embeds": pipe._get_prompt_embeds(captions, encoder.spec.max_tokens, "cpu")}


def ltx2(model: Any, tokens: Any, encoder: PromptEncoder, captions: list[str]) -> Answer:
    pipe = bare("LTX2Pipeline", text_encoder=model, tokenizer=tokens)
    states, mask = pipe._get_gemma_prompt_embeds(
        captions, max_sequence_length=encoder.spec.max_tokens
    )
    return {"prompt_embeds": states, "prompt_attention_mask": mask}


def sd3_clip(model: Any, tokens: Any, encoder: PromptEncoder, captions: list[str]) -> Answer:
    pipe = bare("StableDiffusion3Pipeline", text_encoder=model, tokenizer=tokens)
    states, vectors = pipe._get_clip_prompt_embeds(captions)
    return {"states": states, "pooled": vectors}


def sd3_t5(model: Any, tokens: Any, encoder: PromptEncoder, captions: list[str]) -> Answer:
    pipe = bare(
        "StableDiffusion3Pipeline", text_encoder_3=model, tokenizer_3=tokens, text_encoder=model
    )
    return {"states": pipe._get_t5_prompt_embeds(captions)}


def flux1_clip(model: Any, tokens: Any, encoder: PromptEncoder, captions: list[str]) -> Answer:
    pipe = bare("FluxPipeline", text_encoder=model, tokenizer=tokens)
    return {"pooled_prompt_embeds": pipe._get_clip_prompt_embeds(captions)}


def flux1_t5(model: Any, tokens: Any, encoder: PromptEncoder, captions: list[str]) -> Answer:
    pipe = bare("FluxPipeline", text_encoder_2=model, tokenizer_2=tokens, text_encoder=model)
    return {
        "prompt_embeds": pipe._get_t5_prompt_embeds(
            captions, max_sequence_length=encoder.spec.max_tokens
        )
    }


def chroma(model: Any, tokens: Any, encoder: PromptEncoder, captions: list[str]) -> Answer:
    pipe = bare("ChromaPipeline", text_encoder=model, tokenizer=tokens)
    return {
        "states": pipe._get_t5_prompt_embeds(captions, max_sequence_length=encoder.spec.max_tokens)[
            0
        ]
    }


def pixart(model: Any, tokens: Any, encoder: PromptEncoder, captions: list[str]) -> Answer:
    pipe = bare("PixArtSigmaPipeline", text_encoder=model, tokenizer=tokens)
    states, mask, *_ = pipe.encode_prompt(
        captions, False, max_sequence_length=encoder.spec.max_tokens
    )
    return {"prompt_embeds": states, "prompt_attention_mask": mask}


def auraflow(model: Any, tokens: Any, encoder: PromptEncoder, captions: list[str]) -> Answer:
    pipe = bare("AuraFlowPipeline", text_encoder=model, tokenizer=tokens)
    states, mask, *_ = pipe.encode_prompt(captions, do_classifier_free_guidance=False)
    # one number of the mask for every channel, in one row: of each token all are alike
    return {"states": states, "mask": mask.view(states.shape)[..., 0]}


def masked_t5(name: str) -> Any:
    """A pipeline whose method gives T5 states with a mask, or without."""

    def ask(model: Any, tokens: Any, encoder: PromptEncoder, captions: list[str]) -> Answer:
        # its package is not needed here
        checker = {"safety_checker": tokens} if name.startswith("Cosmos") else {}
        pipe = bare(name, text_encoder=model, tokenizer=tokens, **checker)
        if name in ("HeliosPipeline", "SkyReelsV2Pipeline"):
            without_ftfy(sys.modules[type(pipe).__module__])
        found = pipe._get_t5_prompt_embeds(captions, max_sequence_length=encoder.spec.max_tokens)
        states, mask = found if isinstance(found, tuple) else (found, None)
        answer = {"prompt_embeds": states}
        return (
            answer
            if mask is None or name == "HeliosPipeline"
            else {**answer, "prompt_attention_mask": mask}
        )

    return ask


def ltx_video(model: Any, tokens: Any, encoder: PromptEncoder, captions: list[str]) -> Answer:
    pipe = bare("LTXPipeline", text_encoder=model, tokenizer=tokens)
    return {"states": pipe._get_t5_prompt_embeds(captions)[0]}


def motif(model: Any, tokens: Any, encoder: PromptEncoder, captions: list[str]) -> Answer:
    pipe = bare("MotifVideoPipeline", text_encoder=model, tokenizer=tokens)
    found = pipe.encode_prompt(captions, max_sequence_length=encoder.spec.max_tokens)
    return {"prompt_embeds": found[0], "prompt_attention_mask": found[2]}


def without_ftfy(module: Any) -> None:
    """Some pipelines do not run without this package, which mends broken text: these captions are
    whole.
    """
    module.ftfy = SimpleNamespace(fix_text=str)


def prx(model: Any, tokens: Any, encoder: PromptEncoder, captions: list[str]) -> Answer:
    without_ftfy(importlib.import_module("diffusers.pipelines.prx.pipeline_prx"))
    pipe = bare("PRXPipeline", text_encoder=model, tokenizer=tokens)
    states, mask, *_ = pipe._encode_prompt_standard(
        captions,
        torch.device("cpu"),
        False,
        tokenizer_max_length=encoder.spec.max_tokens,
        skip_text_cleaning=True,
    )
    return {"prompt_embeds": states, "prompt_attention_mask": mask}


def lumina(model: Any, tokens: Any, encoder: PromptEncoder, captions: list[str]) -> Answer:
    pipe = bare("LuminaPipeline", text_encoder=model, tokenizer=tokens)
    states, mask = pipe._get_gemma_prompt_embeds(captions)
    longest = int(mask.sum(1).max())  # the mask hides what makes it a multiple of 8
    return {"prompt_embeds": states[:, :longest], "prompt_attention_mask": mask[:, :longest]}


def allegro(model: Any, tokens: Any, encoder: PromptEncoder, captions: list[str]) -> Answer:
    pipe = bare("AllegroPipeline", text_encoder=model, tokenizer=tokens)
    states, mask, *_ = pipe.encode_prompt(captions, False, clean_caption=False)
    return {"prompt_embeds": states, "prompt_attention_mask": mask}
