"""What an encoder cannot do is told in one line, with exit code 2, before Ray starts or a model is
loaded.
"""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoTokenizer

from lidit.text import PromptTokenizer, resolve_encoder
from tests.helpers.command import lidit
from tests.helpers.corpus_factory import make_corpus

CHAT = {"chat_template": True, "instruction": ""}
NO_SYSTEM = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('System role not "
    "supported') }}"
    "{% endif %}{{ m['content'] }}{% endfor %}"
)
TODAY = "{{ strftime_now('%d %B %Y') }} {% for m in messages %}{{ m['content'] }}{% endfor %}"
THINKS = (
    "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if enable_thinking %}<think>{% "
    "endif %}"
)


@pytest.mark.parametrize(
    ("changes", "template", "message"),
    [
        ({"layers": [2, 9]}, None, "layer 9: .* has 6 blocks"),
        ({"layer": -7}, None, "layer -7: .* has 6 blocks"),
        ({"suffix": "kept"}, None, "set template, or chat_template: true"),
        (
            {**CHAT, "system_prompt": "Be exact."},
            NO_SYSTEM,
            "System role not supported.*leave system_prompt empty",
        ),
        (CHAT, TODAY, "prints today's date.*set template_date: YYYY-MM-DD"),
        (
            {**CHAT, "suffix": "kept", "generation_prompt": True},
            THINKS,
            "set thinking: true or false",
        ),
        (CHAT, "nothing of it", "drops the user's text"),
        ({"template": "{}", "padding": {}}, None, "no pad token"),
        ({"template": "see {}", "empty": "bos"}, None, "no beginning-of-text token"),
        ({"template": "see {} there"}, None, "set suffix: kept, or dropped"),
    ],
)
def test_one_line_before_a_model_is_loaded(
    changes: dict[str, Any],
    template: str | None,
    message: str,
    tmp_path: Path,
    model_of: Callable[[str], Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = Path(shutil.copytree(model_of("llama"), tmp_path / "model"))
    tokens = AutoTokenizer.from_pretrained(folder)
    tokens.pad_token = tokens.bos_token = None
    tokens.save_pretrained(folder)
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    (folder / "model.safetensors").write_bytes(b"no weights: whoever loads them says so")
    (tmp_path / "encoder.yaml").write_text(
        yaml.safe_dump({"name": "bad", "model": str(folder), **changes})
    )
    make_corpus(tmp_path / "corpus", [["a cat"]])
    capsys.readouterr()
    assert lidit("embed", tmp_path / "corpus", "--encoder", tmp_path / "encoder.yaml") == 2
    told = capsys.readouterr().err.strip()
    assert told.startswith("error: ")
    assert "\n" not in told
    assert re.search(message, told), told
    assert not list((tmp_path / "corpus").glob("text/*"))


@pytest.mark.parametrize("changes", [{}, {"chat_template": True}])
def test_captions_that_melt_into_an_instruction_are_counted(
    changes: dict[str, Any],
    tmp_path: Path,
    model_of: Callable[[str], Path],
    settings: Callable[..., Any],
) -> None:
    """A tokenizer that puts a space before every text does so before a caption, and not behind an
    instruction.
    """
    captions = ["a red circle", "x", "", "<|im_end|> is a control word"]
    rows = PromptTokenizer(resolve_encoder(settings(model_of("llama"), **changes), "cpu")).tokenize(
        captions
    )
    assert [row.merged for row in rows] == [False] * 4
    folder = Path(shutil.copytree(model_of("llama"), tmp_path / "model"))
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["pre_tokenizer"]["add_prefix_space"] = True
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    rows = PromptTokenizer(resolve_encoder(settings(folder, **changes), "cpu")).tokenize(captions)
    assert [row.merged for row in rows] == [True, True, False, False]
    assert [row.control for row in rows] == [False, False, False, True]
