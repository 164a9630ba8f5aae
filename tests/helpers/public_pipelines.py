"""What the pipelines of public systems make of captions: each asked in its own words, around tiny models."""

import importlib
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import diffusers
import torch

from lidit.text import PromptEncoder
from tests.helpers import public_models as tiny

CAPTIONS = (
    "a red circle",
    "x",
    "two yellow triangles left of a large white star, photographed in the evening light " * 2,
    "A sign that says \"red circle\", and 'green field' on Anna's wall",
    "  一个红色的圆形 in  brackets &amp; more ",
)
Answer = dict[str, Any]  # what the pipeline's call takes, by name; "mask" where another name has no mask of its own


@dataclass(frozen=True)
class System:
    """One shipped encoder. build: model and tokenizer; ask: the pipeline's own answer for captions."""

    build: tiny.Build
    ask: Callable[[torch.nn.Module, Any, PromptEncoder, list[str]], Answer]
    padded: int | None = None
    changes: dict[str, Any] = field(default_factory=dict)
    captions: tuple[str, ...] = CAPTIONS
    one_by_one: bool = False


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


# -- what each pipeline is asked ---------------------------------------------------------------------------------------


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
    states, _ = pipe.encode_prompt(captions, device="cpu", max_sequence_length=encoder.spec.max_tokens)
    return {"prompt_embeds": states}


def flux2_dev(model: Any, tokens: Any, encoder: PromptEncoder, captions: list[str]) -> Answer:
    pipe = bare("Flux2Pipeline", text_encoder=model, tokenizer=tokens)
    states, _ = pipe.encode_prompt(captions, device="cpu", max_sequence_length=encoder.spec.max_tokens)
    return {"prompt_embeds": states}


def krea2(model: Any, tokens: Any, encoder: PromptEncoder, captions: list[str]) -> Answer:
    """The pipeline puts the suffix behind the padding; no token's place counts there, so here padding comes last."""
    pipe = bare("Krea2Pipeline", text_encoder=model, tokenizer=tokens)
    pipe.prompt_template_encode_start_idx = prefix(encoder)
    pipe.prompt_template_encode_num_suffix_tokens = suffix = len(encoder.tokenizer.suffix_ids)
    states, mask = pipe.encode_prompt(captions, device="cpu", max_sequence_length=encoder.spec.max_tokens + suffix)
    order = torch.argsort((~mask).long(), dim=1, stable=True)
    moved = torch.take_along_dim(states, order[:, :, None, None], dim=1)
    longest = int(mask.sum(1).max())
    return {"prompt_embeds": moved[:, :longest], "prompt_embeds_mask": mask.sort(descending=True)[0][:, :longest]}


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


def hunyuan_image_glyphs(model: Any, tokens: Any, encoder: PromptEncoder, captions: list[str]) -> Answer:
    pipe = bare("HunyuanImagePipeline", text_encoder_2=model, tokenizer_2=tokens)
    nothing = torch.zeros(len(captions), 1, 8)
    found = pipe.encode_prompt(
        captions, "cpu", batch_size=len(captions), prompt_embeds=nothing, prompt_embeds_mask=nothing[..., 0]
    )
    return {"prompt_embeds_2": found[2], "prompt_embeds_mask_2": found[3]}


def hunyuan_video(model: Any, tokens: Any, encoder: PromptEncoder, captions: list[str]) -> Answer:
    pipe = bare("HunyuanVideoPipeline", text_encoder=model, tokenizer=tokens)
    template = {"template": encoder.spec.text.template, "crop_start": prefix(encoder)}
    states, mask = pipe._get_llama_prompt_embeds(captions, template, max_sequence_length=encoder.spec.max_tokens)
    return {"prompt_embeds": states, "prompt_attention_mask": mask}


def hunyuan_video_15(model: Any, tokens: Any, encoder: PromptEncoder, captions: list[str]) -> Answer:
    kind = diffusers.HunyuanVideo15Pipeline
    states, mask = kind._get_mllm_prompt_embeds(
        model, tokens, captions, torch.device("cpu"), encoder.spec.max_tokens, crop_start=prefix(encoder)
    )
    return {"prompt_embeds": states, "prompt_embeds_mask": mask}


def kandinsky5(model: Any, tokens: Any, encoder: PromptEncoder, captions: list[str]) -> Answer:
    """Padding stands behind the text and is not masked; the pipeline's lengths say where it begins."""
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
            captions, tiny.Processor(tokens), model, *vectors, encoder.spec.max_tokens, torch.device("cpu")
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
    return {"prompt_embeds": pipe._encode_prompt(list(captions), max_sequence_length=encoder.spec.max_tokens)}


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
    states, mask, *_ = pipe.encode_prompt(captions, False, device="cpu", max_sequence_length=encoder.spec.max_tokens)
    return {"prompt_embeds": states, "prompt_attention_mask": mask}


def sana(model: Any, tokens: Any, encoder: PromptEncoder, captions: list[str]) -> Answer:
    pipe = bare("SanaPipeline", text_encoder=model, tokenizer=tokens)
    instruction = encoder.spec.text.template.removesuffix("{}").split("\n")
    states, mask, *_ = pipe.encode_prompt(captions, False, device="cpu", complex_human_instruction=instruction)
    return {"prompt_embeds": states, "prompt_attention_mask": mask}


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
    vae.config, vae.temperal_downsample = SimpleNamespace(latents_mean=[0.0], latents_std=[1.0], z_dim=1), [True]
    parts = {"text_encoder": model, "tokenizer": tokens, "safety_checker": tokens, "vae": vae}
    pipe = bare("Cosmos2_5_PredictBasePipeline", **parts)
    return {"prompt_embeds": pipe._get_prompt_embeds(captions, encoder.spec.max_tokens, "cpu")}


def ltx2(model: Any, tokens: Any, encoder: PromptEncoder, captions: list[str]) -> Answer:
    pipe = bare("LTX2Pipeline", text_encoder=model, tokenizer=tokens)
    states, mask = pipe._get_gemma_prompt_embeds(captions, max_sequence_length=encoder.spec.max_tokens)
    return {"prompt_embeds": states, "prompt_attention_mask": mask}


def sd3_clip(model: Any, tokens: Any, encoder: PromptEncoder, captions: list[str]) -> Answer:
    pipe = bare("StableDiffusion3Pipeline", text_encoder=model, tokenizer=tokens)
    states, vectors = pipe._get_clip_prompt_embeds(captions)
    return {"states": states, "pooled": vectors}


def sd3_t5(model: Any, tokens: Any, encoder: PromptEncoder, captions: list[str]) -> Answer:
    pipe = bare("StableDiffusion3Pipeline", text_encoder_3=model, tokenizer_3=tokens, text_encoder=model)
    return {"states": pipe._get_t5_prompt_embeds(captions)}


def flux1_clip(model: Any, tokens: Any, encoder: PromptEncoder, captions: list[str]) -> Answer:
    pipe = bare("FluxPipeline", text_encoder=model, tokenizer=tokens)
    return {"pooled_prompt_embeds": pipe._get_clip_prompt_embeds(captions)}


def flux1_t5(model: Any, tokens: Any, encoder: PromptEncoder, captions: list[str]) -> Answer:
    pipe = bare("FluxPipeline", text_encoder_2=model, tokenizer_2=tokens, text_encoder=model)
    return {"prompt_embeds": pipe._get_t5_prompt_embeds(captions, max_sequence_length=encoder.spec.max_tokens)}


def chroma(model: Any, tokens: Any, encoder: PromptEncoder, captions: list[str]) -> Answer:
    pipe = bare("ChromaPipeline", text_encoder=model, tokenizer=tokens)
    return {"states": pipe._get_t5_prompt_embeds(captions, max_sequence_length=encoder.spec.max_tokens)[0]}


def pixart(model: Any, tokens: Any, encoder: PromptEncoder, captions: list[str]) -> Answer:
    pipe = bare("PixArtSigmaPipeline", text_encoder=model, tokenizer=tokens)
    states, mask, *_ = pipe.encode_prompt(captions, False, max_sequence_length=encoder.spec.max_tokens)
    return {"prompt_embeds": states, "prompt_attention_mask": mask}


def auraflow(model: Any, tokens: Any, encoder: PromptEncoder, captions: list[str]) -> Answer:
    pipe = bare("AuraFlowPipeline", text_encoder=model, tokenizer=tokens)
    return {"states": pipe.encode_prompt(captions, do_classifier_free_guidance=False)[0]}


def masked_t5(name: str) -> Any:
    """A pipeline whose method gives T5 states with a mask, or without."""

    def ask(model: Any, tokens: Any, encoder: PromptEncoder, captions: list[str]) -> Answer:
        checker = {"safety_checker": tokens} if name.startswith("Cosmos") else {}  # its package is not needed here
        pipe = bare(name, text_encoder=model, tokenizer=tokens, **checker)
        if name in ("HeliosPipeline", "SkyReelsV2Pipeline"):
            without_ftfy(sys.modules[type(pipe).__module__])
        found = pipe._get_t5_prompt_embeds(captions, max_sequence_length=encoder.spec.max_tokens)
        states, mask = found if isinstance(found, tuple) else (found, None)
        answer = {"prompt_embeds": states}
        return answer if mask is None or name == "HeliosPipeline" else {**answer, "prompt_attention_mask": mask}

    return ask


def ltx_video(model: Any, tokens: Any, encoder: PromptEncoder, captions: list[str]) -> Answer:
    pipe = bare("LTXPipeline", text_encoder=model, tokenizer=tokens)
    return {"states": pipe._get_t5_prompt_embeds(captions)[0]}


def motif(model: Any, tokens: Any, encoder: PromptEncoder, captions: list[str]) -> Answer:
    pipe = bare("MotifVideoPipeline", text_encoder=model, tokenizer=tokens)
    found = pipe.encode_prompt(captions, max_sequence_length=encoder.spec.max_tokens)
    return {"prompt_embeds": found[0], "prompt_attention_mask": found[2]}


def without_ftfy(module: Any) -> None:
    """Some pipelines do not run without this package, which mends broken text: these captions are whole."""
    module.ftfy = SimpleNamespace(fix_text=str)


def prx(model: Any, tokens: Any, encoder: PromptEncoder, captions: list[str]) -> Answer:
    without_ftfy(importlib.import_module("diffusers.pipelines.prx.pipeline_prx"))
    pipe = bare("PRXPipeline", text_encoder=model, tokenizer=tokens)
    states, mask, *_ = pipe._encode_prompt_standard(
        captions, torch.device("cpu"), False, tokenizer_max_length=encoder.spec.max_tokens, skip_text_cleaning=True
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


def q25() -> Any:
    return tiny.multimodal("qwen2_5_vl", 4), tiny.qwen()


def q3vl(blocks: int, body: bool = False) -> tiny.Build:
    return lambda: (tiny.multimodal("qwen3_vl", blocks, body), tiny.qwen())


def t5() -> Any:
    return tiny.t5_encoder(), tiny.t5()


def umt5() -> Any:
    return tiny.t5_encoder(umt5=True), tiny.t5()


SHORT = {"max_tokens": 160}
SYSTEMS = {
    "qwen-image": System(q25, qwen_image),
    "qwen-image-2.1": System(q3vl(4), qwen_image_21),
    "dreamlite": System(q3vl(4), dreamlite),
    "flux2-klein": System(lambda: (tiny.decoder("qwen3", 30), tiny.qwen(tiny.QWEN3)), flux2_klein, changes=SHORT),
    "flux2-dev": System(
        lambda: (tiny.multimodal("mistral3", 32), tiny.mistral("left")),
        flux2_dev,
        changes={"max_tokens": 224},
        captions=(*CAPTIONS, "two [IMG] marks [IMG]"),
    ),
    "krea2": System(q3vl(36, body=True), krea2, padded=None),
    "ideogram4": System(q3vl(36, body=True), ideogram4, padded=200),
    "hunyuan-image": System(q25, hunyuan_image, padded=160, changes=SHORT),
    "hunyuan-image-glyphs": System(lambda: (tiny.t5_encoder(words=384), tiny.byt5()), hunyuan_image_glyphs, padded=128),
    "hunyuan-video": System(lambda: (tiny.trunk("llama", 4), tiny.llama3()), hunyuan_video, padded=256),
    "hunyuan-video-1.5": System(
        lambda: (tiny.multimodal("qwen2_5_vl", 4, body=True).language_model, tiny.qwen()),
        hunyuan_video_15,
        padded=160,
        changes=SHORT,
    ),
    "kandinsky5": System(q25, kandinsky5),
    "kandinsky6": System(q25, kandinsky6, padded=160, changes=SHORT),
    "longcat-image": System(q25, longcat, changes=SHORT),
    "z-image": System(lambda: (tiny.trunk("qwen3", 4), tiny.qwen(tiny.QWEN3)), z_image, changes=SHORT),
    "ovis-image": System(lambda: (tiny.trunk("qwen3", 4), tiny.qwen(tiny.QWEN3)), ovis, padded=256),
    "nucleus-image": System(q3vl(10), nucleus),
    "ernie-image": System(lambda: (tiny.trunk("ministral3", 4), tiny.mistral("left")), ernie),
    "cogview4": System(lambda: (tiny.trunk("glm", 4, pad_token_id=0), tiny.glm()), cogview4, one_by_one=True),
    "lumina2": System(lambda: (tiny.trunk("gemma2", 4), tiny.gemma()), lumina2, padded=256),
    "sana": System(lambda: (tiny.trunk("gemma2", 4), tiny.gemma()), sana, padded=300),
    "hidream-llama": System(lambda: (tiny.decoder("llama", 4), tiny.llama3()), hidream_llama),
    "hidream-t5": System(t5, hidream_t5),
    "hidream-clip": System(lambda: (tiny.clip_text(projected=True, longest=248), tiny.clip(longest=248)), hidream_clip),
    "fibo": System(lambda: (tiny.decoder("smollm3", 4, words=128_004, pad_token_id=0), tiny.smollm3()), fibo),
    "fibo-layers": System(lambda: (tiny.decoder("smollm3", 4, words=128_004, pad_token_id=0), tiny.smollm3()), fibo),
    "fibo2": System(q3vl(36), fibo2),
    "cosmos-predict2.5": System(q25, cosmos25, changes=SHORT),
    "ltx2": System(lambda: (tiny.multimodal("gemma3", 4), tiny.gemma()), ltx2, padded=1024),
    "sd3-clip-l": System(lambda: (tiny.clip_text(projected=True), tiny.clip()), sd3_clip),
    "sd3-clip-g": System(lambda: (tiny.clip_text(projected=True), tiny.clip("!!")), sd3_clip),
    "sd3-t5": System(t5, sd3_t5),
    "clip-l": System(lambda: (tiny.clip_text(projected=False), tiny.clip()), flux1_clip),
    "flux1-t5": System(t5, flux1_t5, changes=SHORT),
    "chroma": System(t5, chroma, changes=SHORT),
    "pixart": System(t5, pixart, padded=300),
    "auraflow": System(umt5, auraflow, padded=256),
    "mochi": System(t5, masked_t5("MochiPipeline"), padded=256),
    "cogvideox": System(t5, masked_t5("CogVideoXPipeline")),
    "ltx-video": System(t5, ltx_video),
    "wan": System(umt5, masked_t5("WanPipeline"), padded=512),
    "cosmos1": System(t5, masked_t5("CosmosTextToWorldPipeline"), padded=512),
    "helios": System(umt5, masked_t5("HeliosPipeline"), padded=512),
    "skyreels-v2": System(umt5, masked_t5("SkyReelsV2Pipeline"), padded=512),
    "prx": System(lambda: (tiny.t5gemma(), tiny.gemma()), prx, padded=256),
    "lumina": System(lambda: (tiny.trunk("gemma", 4), tiny.gemma()), lumina),
    "cogview3-plus": System(t5, masked_t5("CogView3PlusPipeline")),
    "allegro": System(t5, allegro, padded=512),
    "motif-video": System(lambda: (tiny.t5gemma2(), tiny.gemma()), motif, padded=512),
}
