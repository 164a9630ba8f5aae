"""Templates with a suffix, padding, captions' cleaning: each against the whole model."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from lidit.config import EncoderSettings
from lidit.config.settings import validate
from lidit.errors import InputError
from lidit.store import Corpus
from lidit.text import resolve_encoder
from lidit.text.cleaning import clean, split_quoted
from lidit.text.embedding import ensure_shared
from lidit.text.rules import PaddingRule, TextRules, set_fields
from tests.helpers.corpus_factory import make_corpus
from tests.helpers.whole_model import CAPTIONS, Make, close, load, whole
from tests.text.test_embedding import embed

# -- templates -------------------------------------------------------------------------------------


def test_a_suffix_sees_the_caption_and_changes_no_state_of_it(
    model_of: Callable[[str], Path], settings: Make
) -> None:
    chat = {"chat_template": True, "system_prompt": "Be exact.", "instruction": ""}
    plain = load(settings(model_of("llama"), **chat)).encode(CAPTIONS)
    encoder = load(settings(model_of("llama"), suffix="kept", generation_prompt=True, **chat))
    tokenizer = AutoTokenizer.from_pretrained(model_of("llama"))
    assert tokenizer.decode(encoder.tokenizer.suffix_ids) == "<|im_end|>\n<|im_start|>assistant\n"
    for caption, before, found in zip(CAPTIONS, plain, encoder.encode(CAPTIONS), strict=True):
        messages = [
            {"role": "system", "content": "Be exact."},
            {"role": "user", "content": caption},
        ]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        prefix = encoder.tokenizer.prefix_ids
        assert [*prefix, *found.token_ids] == ids
        assert close(found.states, whole(model_of("llama"), ids)[-3][len(prefix) :])
        assert close(found.states[: len(before.states)], before.states)
    ids, states = encoder.empty_states()
    assert ids == encoder.tokenizer.suffix_ids
    assert len(states) == len(ids)


def test_a_written_template_is_the_same_text(
    model_of: Callable[[str], Path], settings: Make
) -> None:
    template = "<|im_start|>user\nPhoto of {}<|im_end|>\n"
    encoder = load(settings(model_of("qwen2"), template=template, suffix="kept"))
    tokenizer = AutoTokenizer.from_pretrained(model_of("qwen2"))
    for caption, row in zip(CAPTIONS, encoder.tokenizer.tokenize(CAPTIONS), strict=True):
        assert [*encoder.tokenizer.prefix_ids, *row.token_ids] == tokenizer(
            template.format(caption)
        )["input_ids"]
        assert not row.merged


def test_a_caption_that_melts_into_its_instruction_is_counted(
    tmp_path: Path, model_of: Callable[[str], Path], settings: Make
) -> None:
    encoder = load(settings(model_of("qwen2"), template="one red circ{}", storage="float32"))
    rows = encoder.tokenizer.tokenize(["le", " and a blue square", "<|im_end|>le"])
    assert [row.merged for row in rows] == [True, False, False]
    assert [row.control for row in rows] == [False, False, True]
    family = Corpus.open(make_corpus(tmp_path, [["le", "x"]]).folder.location)
    embed(family, encoder)
    assert family.text_family("tiny").manifest["counts"]["merged"] == 1


@pytest.mark.parametrize(
    ("counted", "expected"),
    [("caption", lambda prefix, suffix: 6 + suffix), ("with_suffix", lambda prefix, suffix: 6),
     ("whole", lambda prefix, suffix: 6 - prefix)],
)  # fmt: skip
def test_what_max_tokens_counts(
    counted: str,
    expected: Callable[[int, int], int],
    model_of: Callable[[str], Path],
    settings: Make,
) -> None:
    changes = {"template": "<|im_start|>{}<|im_end|>", "suffix": "kept", "max_tokens": 6}
    tokens = load(settings(model_of("qwen2"), counted=counted, **changes)).tokenizer
    row = tokens.tokenize([CAPTIONS[2]])[0]
    assert row.truncated
    assert (
        len(row.token_ids)
        == expected(len(tokens.prefix_ids), len(tokens.suffix_ids))
        == tokens.longest
    )


def test_without_a_causal_mask_a_dropped_suffix_is_read(
    model_of: Callable[[str], Path], settings: Make
) -> None:
    changes = {"kind": "unmasked", "chat_template": True, "instruction": ""}
    without = load(settings(model_of("llama"), **changes)).encode(CAPTIONS)
    dropped = load(settings(model_of("llama"), suffix="dropped", **changes)).encode(CAPTIONS)
    kept = load(settings(model_of("llama"), suffix="kept", **changes)).encode(CAPTIONS)
    for one, other, whole_ in zip(without, dropped, kept, strict=True):
        assert one.token_ids == other.token_ids
        assert not close(one.states, other.states)
        assert close(other.states, whole_.states[: len(other.states)])


# -- what an empty caption is, padding -------------------------------------------------------------


@pytest.mark.parametrize("template", ["photo:\n{}", "photo: {}"])
@pytest.mark.parametrize(("empty", "expected"), [(9, (9,)), ("bos", (1,)), ("nothing", ())])
def test_an_empty_caption(
    template: str,
    empty: Any,
    expected: tuple[int, ...],
    tmp_path: Path,
    model_of: Callable[[str], Path],
    settings: Make,
) -> None:
    encoder = load(settings(model_of("qwen2"), template=template, empty=empty, storage="float32"))
    assert encoder.tokenizer.empty_ids == expected
    embed(make_corpus(tmp_path, [CAPTIONS]), encoder)
    assert len(Corpus.open(tmp_path).text_family("tiny").shared().empty) == len(expected)


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("template", ["{}", "photo:\n{}"])
def test_padding_is_what_the_whole_model_makes_of_it(
    template: str, masked: bool, model_of: Callable[[str], Path], settings: Make
) -> None:
    changes = {
        "template": template,
        "padding": {"masked": masked},
        "max_tokens": 30,
        "counted": "whole",
    }
    encoder = load(settings(model_of("qwen2"), **changes))
    prefix = encoder.tokenizer.prefix_ids
    model = AutoModel.from_pretrained(model_of("qwen2")).eval()
    for found in encoder.encode(CAPTIONS):
        ids = torch.tensor([[*prefix, *found.token_ids]])
        assert ids.shape[1] == 30
        mask = (ids != 3).long() if masked else torch.ones_like(ids)
        with torch.no_grad():
            states = model(ids, attention_mask=mask, output_hidden_states=True).hidden_states[-3]
        assert close(found.states, states[0, len(prefix) :])


@pytest.mark.parametrize("template", ["{}", "photo:\n{}"])
def test_padding_of_a_given_token_at_a_given_position(
    template: str, model_of: Callable[[str], Path], settings: Make
) -> None:
    padding = {"multiple_of": 8, "masked": True, "token": 9, "position": 1}
    changes = {"template": template, "padding": padding, "counted": "whole"}
    encoder = load(settings(model_of("qwen2"), **changes))
    prefix = encoder.tokenizer.prefix_ids
    model = AutoModel.from_pretrained(model_of("qwen2")).eval()
    for found in encoder.encode(CAPTIONS):
        ids = torch.tensor([[*prefix, *found.token_ids]])
        text = len(prefix) + encoder.tokenizer.without_padding(found.token_ids)
        assert ids.shape[1] % 8 == 0
        assert ids[0, text:].tolist() == [9] * (ids.shape[1] - text)
        place = torch.arange(ids.shape[1])[None]
        inputs = {"attention_mask": (place < text).long(), "position_ids": place.clone()}
        inputs["position_ids"][:, text:] = 1
        with torch.no_grad():
            states = model(ids, **inputs, output_hidden_states=True).hidden_states[-3]
        assert close(found.states, states[0, len(prefix) :])


def test_a_rule_of_an_earlier_release_keeps_its_name() -> None:
    rule = PaddingRule(multiple_of=None, side="right", masked=True, token="pad")
    fields = {"multiple_of": None, "side": "right", "masked": True, "token": "pad"}
    assert set_fields(TextRules(padding=rule)) == {"padding": fields}


def test_pooled_vectors_are_stored(
    tmp_path: Path, model_of: Callable[[str], Path], settings: Make
) -> None:
    folder = model_of("clip_text")
    encoder = load(
        settings(
            folder, kind="encoder", layer=-2, pooled="pooler_output", max_tokens=40, storage="int8"
        )
    )
    embed(make_corpus(tmp_path, [CAPTIONS, []]), encoder)
    family = Corpus.open(tmp_path).text_family("tiny")
    vectors = family.pooled(0)
    assert vectors is not None
    model = AutoModel.from_pretrained(folder).eval()
    for vector, ids in zip(vectors, family.token_ids(0), strict=True):
        with torch.no_grad():
            assert close(vector, model(torch.tensor([ids])).pooler_output[0])
    shared = family.shared()
    assert shared.empty_pooled is not None
    with torch.no_grad():
        assert close(shared.empty_pooled, model(torch.tensor([shared.empty_ids])).pooler_output[0])
    assert family.pooled(1) == []


# -- captions' texts -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rules", "text", "expected"),
    [
        (["strip", "lower"], "  A Cat ", "a cat"),
        (["lower", "whitespace"], "A\n\n B", "a b"),
        (["unescape"], "a &amp;amp; b", "a & b"),
        (["no_image_mark"], "a [IMG]b", "a b"),
        (["strip", "space_if_empty"], "  ", " "),
        (["glyphs"], "a sign \"stop\" and 'go'", 'Text "go". Text "stop". '),
        (["glyphs"], "a sign", None),
        (["glyphs", "strip"], "a sign", None),
    ],
)
def test_cleaning(rules: list[str], text: str, expected: str | None) -> None:
    assert clean(text, rules) == expected


def test_quoted_text_is_spelled_and_an_apostrophe_opens_nothing() -> None:
    assert split_quoted('Anna\'s "no" sign') == ["Anna's ", '"', "n", "o", '"', " sign"]
    assert split_quoted("") == []


# -- bad input -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": [1, 99]}, "layer 99"),
        ({"layers": [-8]}, "layer -8"),
        ({"layers": [0]}, "embeddings alone"),
        ({"layers": [1], "final_norm": False}, "final_norm"),
    ],
)
def test_layers_that_a_model_lacks(
    changes: dict[str, Any], message: str, model_of: Callable[[str], Path], settings: Make
) -> None:
    with pytest.raises(InputError, match=message) as caught:
        resolve_encoder(settings(model_of("llama"), **changes), "cpu")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": [1, 2], "layer": -2}, "give one of them"),
        ({"layers": []}, "one at least"),
        ({"join": "mean"}, "set layers"),
        ({"layers": [1, 2], "join": "mean"}, "set normalise"),
        ({"suffix": "kept"}, "set template, or chat_template"),
        ({"template": "no place"}, "exactly once"),
        ({"template": "{} {}"}, "exactly once"),
        ({"template": "a {} b"}, "set suffix"),
        ({"template": "{}", "instruction": "Look:"}, "leave chat_template"),
        ({"generation_prompt": True, "chat_template": True}, "set chat_template and suffix"),
        ({"thinking": True}, "set chat_template"),
        ({"kind": "encoder", "template": "a {}"}, "bare caption"),
        ({"pooled": "text_embeds"}, "set kind: encoder"),
        ({"kind": "unmasked", "padding": {}}, "causal and encoder"),
        ({"padding": {"position": 1}}, "on the right that is masked"),
        ({"padding": {"position": 1, "masked": True}, "kind": "encoder"}, "for kind: causal"),
        ({"template": "{} b", "suffix": "dropped", "padding": {}}, "behind the suffix"),
    ],
)
def test_settings_that_exclude_each_other(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        validate(EncoderSettings, {"name": "tiny", "model": "nowhere", **changes}, "here.yaml")
    assert str(caught.value).startswith("here.yaml: ")
    assert "\n" not in str(caught.value)


def test_a_thinking_template_asks_for_an_answer(
    tmp_path: Path, model_of: Callable[[str], Path], settings: Make
) -> None:
    shutil.copytree(model_of("qwen3"), tmp_path / "model")
    template = (tmp_path / "model" / "chat_template.jinja").read_text()
    (tmp_path / "model" / "chat_template.jinja").write_text(
        template + "{% if enable_thinking %}<think>{% endif %}"
    )
    chat = {"chat_template": True, "suffix": "kept", "generation_prompt": True}
    with pytest.raises(InputError, match="set thinking"):
        load(settings(tmp_path / "model", **chat))
    thinks = load(settings(tmp_path / "model", thinking=True, **chat)).tokenizer.suffix_ids
    assert thinks != load(settings(tmp_path / "model", thinking=False, **chat)).tokenizer.suffix_ids


def test_padding_and_empty_captions_without_the_tokens_for_it(
    tmp_path: Path, model_of: Callable[[str], Path], settings: Make
) -> None:
    shutil.copytree(model_of("qwen2"), tmp_path / "model")
    tokens = AutoTokenizer.from_pretrained(tmp_path / "model")
    tokens.pad_token = tokens.bos_token = None
    tokens.save_pretrained(tmp_path / "model")
    with pytest.raises(InputError, match="no pad token"):
        load(settings(tmp_path / "model", template="{}", padding={}))
    with pytest.raises(InputError, match="has no token 99999"):
        load(settings(tmp_path / "model", template="{}", padding={"token": 99999}))
    with pytest.raises(InputError, match="no beginning-of-text token"):
        load(settings(tmp_path / "model", template="{}", empty="bos"))


def test_a_model_without_a_pooled_output_is_refused(
    model_of: Callable[[str], Path], settings: Make
) -> None:
    with pytest.raises(InputError, match="pooler_output"):
        load(settings(model_of("t5"), kind="encoder", layer=-1, pooled="pooler_output"))
    with pytest.raises(InputError, match="projects no pooled output"):
        load(settings(model_of("t5"), kind="encoder", layer=-1, pooled="text_embeds"))


def test_a_family_behind_another_suffix_is_not_continued(
    tmp_path: Path, model_of: Callable[[str], Path], settings: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a change of what renders chat templates."""
    encoder = load(settings(model_of("llama"), chat_template=True, suffix="kept"))
    writer = embed(make_corpus(tmp_path, [CAPTIONS]), encoder)
    ensure_shared(encoder, writer)
    monkeypatch.setattr(encoder.tokenizer, "empty_ids", (*encoder.tokenizer.empty_ids, 5))
    with pytest.raises(InputError, match="an instruction of other tokens"):
        ensure_shared(encoder, writer)
