"""The public systems that ship as encoders: how a tiny one is built, and what its pipeline is
asked.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from lidit.text import PromptEncoder
from tests.helpers import public_earlier_pipelines as earlier
from tests.helpers import public_models as tiny
from tests.helpers import public_pipelines as asks
from tests.helpers.public_pipelines import Answer

CAPTIONS = (
    "a red circle",
    "x",
    "two yellow triangles left of a large white star, photographed in the evening light " * 2,
    "A sign that says \"red circle\", and 'green field' on Anna's wall",
    "  一个红色的圆形 in  brackets &amp; more ",
)


@dataclass(frozen=True)
class System:
    """One shipped encoder. build: model and tokenizer; ask: the pipeline's own
    answer for captions.
    """

    build: tiny.Build
    ask: Callable[[torch.nn.Module, Any, PromptEncoder, list[str]], Answer]
    padded: int | None = None
    changes: dict[str, Any] = field(default_factory=dict)
    captions: tuple[str, ...] = CAPTIONS
    one_by_one: bool = False


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
    "qwen-image": System(q25, asks.qwen_image),
    "qwen-image-2.1": System(q3vl(4), asks.qwen_image_21),
    "dreamlite": System(q3vl(4), asks.dreamlite),
    "flux2-klein": System(
        lambda: (tiny.decoder("qwen3", 30), tiny.qwen(tiny.QWEN3)), asks.flux2_klein, changes=SHORT
    ),
    "flux2-dev": System(
        lambda: (tiny.multimodal("mistral3", 32), tiny.mistral("left")),
        asks.flux2_dev,
        changes={"max_tokens": 224},
        captions=(*CAPTIONS, "two [IMG] marks [IMG]"),
    ),
    "flux3": System(q3vl(36), asks.flux3, one_by_one=True, changes={"max_tokens": 400}),
    "krea2": System(q3vl(36, body=True), asks.krea2, padded=None),
    "ideogram4": System(q3vl(36, body=True), asks.ideogram4, padded=200),
    "hunyuan-image": System(q25, asks.hunyuan_image, padded=160, changes=SHORT),
    "hunyuan-image-glyphs": System(
        lambda: (tiny.t5_encoder(words=384), tiny.byt5()), asks.hunyuan_image_glyphs, padded=128
    ),
    "hunyuan-video": System(
        lambda: (tiny.trunk("llama", 4), tiny.llama3()), asks.hunyuan_video, padded=256
    ),
    "hunyuan-video-1.5": System(
        lambda: (tiny.multimodal("qwen2_5_vl", 4, body=True).language_model, tiny.qwen()),
        asks.hunyuan_video_15,
        padded=160,
        changes=SHORT,
    ),
    "kandinsky5": System(q25, asks.kandinsky5),
    "kandinsky6": System(q25, asks.kandinsky6, padded=160, changes=SHORT),
    "longcat-image": System(q25, asks.longcat, changes=SHORT),
    "z-image": System(
        lambda: (tiny.trunk("qwen3", 4), tiny.qwen(tiny.QWEN3)), asks.z_image, changes=SHORT
    ),
    "ovis-image": System(
        lambda: (tiny.trunk("qwen3", 4), tiny.qwen(tiny.QWEN3)), asks.ovis, padded=256
    ),
    "nucleus-image": System(q3vl(10), asks.nucleus),
    "ernie-image": System(lambda: (tiny.trunk("ministral3", 4), tiny.mistral("left")), asks.ernie),
    "cogview4": System(
        lambda: (tiny.trunk("glm", 4, pad_token_id=0), tiny.glm()), asks.cogview4, one_by_one=True
    ),
    "lumina2": System(lambda: (tiny.trunk("gemma2", 4), tiny.gemma()), asks.lumina2, padded=256),
    "sana": System(lambda: (tiny.trunk("gemma2", 4), tiny.gemma()), asks.sana, padded=300),
    "hidream-llama": System(lambda: (tiny.decoder("llama", 4), tiny.llama3()), asks.hidream_llama),
    "hidream-t5": System(t5, asks.hidream_t5),
    "hidream-clip": System(
        lambda: (tiny.clip_text(projected=True, longest=248), tiny.clip(longest=248)),
        asks.hidream_clip,
    ),
    "fibo": System(
        lambda: (tiny.decoder("smollm3", 4, words=128_004, pad_token_id=0), tiny.smollm3()),
        asks.fibo,
    ),
    "fibo-layers": System(
        lambda: (tiny.decoder("smollm3", 4, words=128_004, pad_token_id=0), tiny.smollm3()),
        asks.fibo,
    ),
    "fibo2": System(q3vl(36), asks.fibo2),
    "cosmos-predict2.5": System(q25, asks.cosmos25, changes=SHORT),
    "ltx2": System(lambda: (tiny.multimodal("gemma3", 4), tiny.gemma()), asks.ltx2, padded=1024),
    "sd3-clip-l": System(lambda: (tiny.clip_text(projected=True), tiny.clip()), asks.sd3_clip),
    "sd3-clip-g": System(lambda: (tiny.clip_text(projected=True), tiny.clip("!!")), asks.sd3_clip),
    "sd3-t5": System(t5, asks.sd3_t5),
    "clip-l": System(lambda: (tiny.clip_text(projected=False), tiny.clip()), asks.flux1_clip),
    "flux1-t5": System(t5, asks.flux1_t5, changes=SHORT),
    "chroma": System(t5, asks.chroma, changes=SHORT),
    "pixart": System(t5, asks.pixart, padded=300),
    "auraflow": System(umt5, asks.auraflow, padded=256),
    "mochi": System(t5, asks.masked_t5("MochiPipeline"), padded=256),
    "cogvideox": System(t5, asks.masked_t5("CogVideoXPipeline")),
    "ltx-video": System(t5, asks.ltx_video),
    "wan": System(umt5, asks.masked_t5("WanPipeline"), padded=512),
    "cosmos1": System(t5, asks.masked_t5("CosmosTextToWorldPipeline"), padded=512),
    "helios": System(umt5, asks.masked_t5("HeliosPipeline"), padded=512),
    "skyreels-v2": System(umt5, asks.masked_t5("SkyReelsV2Pipeline"), padded=512),
    "prx": System(lambda: (tiny.t5gemma(), tiny.gemma()), asks.prx, padded=256),
    "lumina": System(lambda: (tiny.trunk("gemma", 4), tiny.gemma()), asks.lumina),
    "cogview3-plus": System(t5, asks.masked_t5("CogView3PlusPipeline")),
    "allegro": System(t5, asks.allegro, padded=512),
    "motif-video": System(lambda: (tiny.t5gemma2(), tiny.gemma()), asks.motif, padded=512),
    "minimax-h3": System(q3vl(52), asks.minimax_h3, one_by_one=True),
    "anyflow": System(umt5, asks.masked_t5("AnyFlowPipeline"), padded=512),
    "cosmos2": System(t5, asks.masked_t5("Cosmos2TextToImagePipeline"), padded=512),
    "deepfloyd-if": System(t5, earlier.deepfloyd),
    "kandinsky2.2": System(
        lambda: (tiny.clip_text(projected=True), tiny.clip()), earlier.kandinsky22
    ),
    "sana-video": System(
        lambda: (tiny.trunk("gemma2", 4), tiny.gemma()), asks.sana_video, padded=300
    ),
    "easyanimate": System(
        lambda: (tiny.multimodal("qwen2_vl", 4), tiny.qwen(tiny.QWEN2_VL)), asks.easyanimate
    ),
    "hunyuan-dit-bert": System(
        lambda: (tiny.bert(), tiny.bert_words()), earlier.hunyuan_dit_bert, padded=77
    ),
    "hunyuan-dit-t5": System(t5, earlier.hunyuan_dit_t5, padded=256),
    "kandinsky3": System(t5, earlier.kandinsky3),
    "latte": System(t5, earlier.latte, one_by_one=True),
    "bria3.2": System(t5, earlier.bria, padded=128),
    "sd1": System(lambda: (tiny.clip_text(projected=False), tiny.clip()), earlier.stable_diffusion),
    "sd2": System(
        lambda: (tiny.clip_text(projected=False), tiny.clip("!!")), earlier.stable_diffusion
    ),
    "sdxl-clip-l": System(
        lambda: (tiny.clip_text(projected=False), tiny.clip()), earlier.xl_clip_l
    ),
    "sdxl-clip-g": System(
        lambda: (tiny.clip_text(projected=True), tiny.clip("!!")), earlier.xl_clip_g
    ),
    "stable-cascade": System(
        lambda: (tiny.clip_text(projected=True), tiny.clip()), earlier.stable_cascade
    ),
}
