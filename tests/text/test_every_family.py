"""Every text model that transformers registers: its states are those of the untouched model, or it
is refused.

`python -m tests.text.test_every_family` writes the table in docs/encoders.md anew.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, MODEL_MAPPING, AutoConfig, AutoModel

from lidit.config import EncoderSettings
from lidit.errors import InputError
from lidit.text import PromptEncoder, resolve_encoder
from lidit.text.loading import block_list
from tests.helpers.tiny_models import tiny_tokenizer

PAGE = Path(__file__).parents[2] / "docs" / "encoders.md"
HEADING = "## Families that were tried\n"
HEAD = "| tiny random model | families |"
MOST_PARAMETERS = 20_000_000
BLOCKS = 4
CAPTIONS = [
    "a red circle",
    "x",
    "two yellow triangles left of a large white star, photographed in the evening light",
]
SIZES = {
    "vocab_size": 400, "hidden_size": 32, "d_model": 32, "n_embd": 32, "intermediate_size": 64,
    "d_ff": 64,
    "d_inner": 64, "ffn_dim": 64, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64,
    "num_hidden_layers": BLOCKS,
    "num_layers": BLOCKS, "n_layer": BLOCKS, "n_layers": BLOCKS, "encoder_layers": BLOCKS,
    "decoder_layers": 2,
    "num_decoder_layers": 2, "num_attention_heads": 4, "num_heads": 4, "n_head": 4, "n_heads": 4,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "d_kv":
    8, "moe_intermediate_size": 32, "num_experts": 4, "n_routed_experts": 4, "num_local_experts": 4,
    "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "q_lora_rank": 16, "kv_lora_rank": 16,
    "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "sliding_window": 16,
    "rotary_dim": 8, "max_position_embeddings": 512, "n_positions": 512, "embedding_size": 32,
    "emb_dim": 32,
    "type_vocab_size": 2,
    "pad_token_id": 3, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 3,
    "query_pre_attn_scalar":
    8,
}  # fmt: skip
# Families whose parts must fit together in a way of their own: sizes that are changed, or left out
# (None).
CHANGES: tuple[dict[str, Any], ...] = (
    {},
    {"num_key_value_heads": 4},  # latent attention repeats no head
    dict.fromkeys(("head_dim", "sliding_window", "n_heads", "num_heads")),
    # where they are another name of the same
    dict.fromkeys(("num_hidden_layers", "num_local_experts")),
    {"num_key_value_heads": 4, **dict.fromkeys(
        ("head_dim", "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim",
         "v_head_dim", "d_inner"))},
    dict.fromkeys(set(SIZES) - {
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads", "pad_token_id", "bos_token_id", "eos_token_id"}),
)  # fmt: skip


def mrope(*sections: int, **more: float) -> dict[str, Any]:
    return {
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": list(sections),
            **more,
        }
    }


OWN: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("qwen2_vl_text", "qwen2_5_vl_text", "hunyuan_vl_text"), mrope(1, 1, 2)),
    **dict.fromkeys(
        ("glm4v_text", "glm4v_moe_text", "glm_image_text", "glm_ocr_text"),
        mrope(1, 1, 2, partial_rotary_factor=1.0),
    ),
    "gpt_neo": {"attention_types": [[["global", "local"], BLOCKS // 2]]},
    "xmod": {"default_language": "en_XX"},
}


def text_families() -> list[str]:
    """Model types of one config that AutoModel builds, and whose config says that
    they read text.
    """
    found = []
    for name in CONFIG_MAPPING:
        try:
            kind = CONFIG_MAPPING[name]
            config = kind()
        except Exception:  # a config of several models, or of one that needs a package
            continue
        if kind not in MODEL_MAPPING or getattr(kind, "sub_configs", None):
            continue
        if all(
            isinstance(getattr(config, key, None), int)
            for key in ("vocab_size", "hidden_size", "num_hidden_layers")
        ):
            found.append(name)
    return found


def tiny(name: str, folder: Path) -> Any:
    """Write a random model of a family, and return its text model; why not, where it does not run
    by itself.
    """
    kind = CONFIG_MAPPING[name]
    names = {*kind().to_dict(), *kind.attribute_map}
    for changes in CHANGES:
        sizes = {**SIZES, **changes}
        known = {key: value for key, value in sizes.items() if key in names and value is not None}
        try:
            config = kind(**{**known, **OWN.get(name, {})})
            with torch.device("meta"):
                parameters = sum(p.numel() for p in AutoModel.from_config(config).parameters())
            if parameters > MOST_PARAMETERS:
                continue
            torch.manual_seed(0)
            model = AutoModel.from_config(config).float().eval()
            for label, parameter in model.named_parameters():
                if parameter.ndim >= 2:
                    torch.nn.init.normal_(parameter, std=0.15)
                elif "norm" not in label.lower():
                    torch.nn.init.normal_(parameter, std=0.1)
            model.save_pretrained(folder)
            whole = AutoModel.from_pretrained(folder).eval()
            reference = whole.get_encoder() if whole.config.is_encoder_decoder else whole
            with torch.no_grad():
                reference(input_ids=torch.tensor([[5, 6, 7]]))
        except Exception as error:  # whatever a family's own code says of such sizes
            if re.search("missing|specify", str(error)):
                return "reads more than token ids"
            continue
        tiny_tokenizer("t5").save_pretrained(folder)
        return reference
    return "no small form by the usual keys"


def verdict(name: str) -> str:
    """`equal`, `refused: reason`, or `not tried: reason`; other outcomes are raised."""
    folder = Path(tempfile.mkdtemp())
    try:
        reference = tiny(name, folder)
        if isinstance(reference, str):
            return f"not tried: {reference}"
        halves = bool(AutoConfig.from_pretrained(folder).is_encoder_decoder)
        kinds = ("encoder",) if halves else ("causal", "encoder")
        refusals = []
        for kind in kinds:
            worst = 0.0
            for layer in (-1, -2):
                try:
                    worst = max(worst, error_of(folder, reference, kind, layer))
                except InputError as error:
                    refusals.append(f"{kind}, {layer}: {reason_of(str(error))}")
            if worst > 1e-4:
                raise AssertionError(f"{name}: {kind}: states differ by {worst:.2g}")
            mine = [line for line in refusals if line.startswith(kind)]
            if len(mine) < 2:
                return f"equal as {kind}" + (
                    f" (layer {mine[0].removeprefix(kind + ', ')})" if mine else ""
                )
        return "refused: " + refusals[-1].partition(": ")[2]
    finally:
        shutil.rmtree(folder)


def error_of(folder: Path, reference: Any, kind: str, layer: int) -> float:
    settings = EncoderSettings(
        name="tiny", model=str(folder), kind=kind, layer=layer, max_tokens=60
    )  # type: ignore[arg-type]
    encoder = PromptEncoder.load(resolve_encoder(settings, "cpu"), "cpu")
    context = encoder.tokenizer.context_ids
    given: list[Any] = []
    hooks = []
    if layer != -1:  # a family's own list of hidden states may hold one more at its end
        blocks = block_list(reference, BLOCKS)
        hooks.append(blocks[layer].register_forward_hook(lambda *seen: given.append(seen[2])))
    worst = 0.0
    for found in encoder.encode(CAPTIONS):
        with torch.no_grad():
            output = reference(
                input_ids=torch.tensor([[*context, *found.token_ids]]), output_hidden_states=True
            )
        if layer == -1:
            states = output.last_hidden_state
        else:  # some keep a list of blocks that they do not call one by one
            block = given.pop() if given else output.hidden_states[layer]
            states = block[0] if isinstance(block, tuple | list) else block
        expected = states[0, len(context) :]
        worst = max(worst, float((found.states - expected).norm() / expected.norm()))
    for hook in hooks:
        hook.remove()
    return worst


def reason_of(message: str) -> str:
    """The reason in a refusal, without names, numbers and remedy."""
    reason = re.sub(r"^(encoder \S+: (\S+: ){0,2}|\w+: )", "", message)
    return re.sub(r"\b\d+\b", "N", re.split(r";| \(|, such as|, so ", reason)[0])


def table() -> str:
    """Equal families and refused ones with their reasons; of others nothing is said."""
    rows: dict[str, list[str]] = {}
    for name in text_families():
        if not (found := verdict(name)).startswith("not tried"):
            rows.setdefault(found, []).append(name)
    order = sorted(rows, key=lambda found: (not found.startswith("equal"), found))
    lines = [f"| {found} | {', '.join(sorted(rows[found]))} |" for found in order]
    return "\n".join([HEAD, "|---|---|", *lines, ""])


def told() -> list[tuple[str, str]]:
    """Family and verdict of every row of the page's table."""
    _, _, rows = PAGE.read_text(encoding="utf-8").partition(HEAD)
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in rows.splitlines()
        if "---" not in line
    ]
    return [(name, cell[0]) for cell in cells if len(cell) == 2 for name in cell[1].split(", ")]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "expected"), told(), ids=lambda value: value.partition(":")[0])
def test_a_family_is_what_the_page_says(name: str, expected: str) -> None:
    assert verdict(name) == expected


if __name__ == "__main__":
    before, _, after = PAGE.read_text(encoding="utf-8").partition(HEADING)
    text, _, _ = after.partition("\n|")  # the table ends the page
    PAGE.write_text(before + HEADING + text + "\n" + table(), encoding="utf-8")
