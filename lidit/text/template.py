"""The text around a caption: a chat template's or a written one's, cut where the caption stands."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lidit.config.encoder import CAPTION
from lidit.errors import InputError, one_line
from lidit.text.specs import EncoderSpec
from lidit.text.template_date import render_dated

CAPTION_MARK = "\N{LEFT WHITE LENTICULAR BRACKET}caption\N{RIGHT WHITE LENTICULAR BRACKET}"


@dataclass(frozen=True)
class Template:
    """before and after: the texts around a caption; gap: spaces between `before` and it, which
    tokenizers join to it;
    specials: whether the tokenizer puts its own special tokens around the whole.
    """

    before: str
    gap: str
    after: str
    specials: bool


def template_of(spec: EncoderSpec, tokenizer: Any) -> Template | None:
    """The template of a spec; None where a plain instruction stands before the caption, or nothing.

    InputError for a chat template that is missing, refuses the conversation, changes from day to
    day or is not told whether to think.
    """
    if spec.text.template is not None:
        before, _, after = spec.text.template.partition(CAPTION)
        return _cut(before, after, specials=True)
    if not spec.chat_template:
        return None
    before, after = _chat(spec, tokenizer)
    if spec.text.suffix is None:  # spaces stay where families of earlier releases have them
        return Template(before, "", "", specials=False)
    return _cut(before, after, specials=False)


def _cut(before: str, after: str, specials: bool) -> Template:
    bare = before.rstrip(" ")
    return Template(bare, before[len(bare) :], after, specials)


def _chat(spec: EncoderSpec, tokenizer: Any) -> tuple[str, str]:
    """The conversation before and behind the caption."""
    where = f"encoder {spec.name}: {spec.folder}"
    if not tokenizer.chat_template:
        raise InputError(f"{where} has no chat template (a base model?); set chat_template: false")
    rules = spec.text
    template = tokenizer.get_chat_template()
    if rules.generation_prompt and rules.thinking is None and "enable_thinking" in template:
        raise InputError(
            f"{where}: the chat template lets the model think or not, which changes the suffix; "
            "set thinking: true or "
            "false"
        )
    user = {
        "role": "user",
        "content": "\n".join(part for part in (spec.instruction, CAPTION_MARK) if part),
    }
    system = [{"role": "system", "content": spec.system_prompt}] if spec.system_prompt else []
    options: dict[str, Any] = {} if rules.thinking is None else {"enable_thinking": rules.thinking}

    def render(template: str) -> str:
        try:
            return str(
                tokenizer.apply_chat_template(
                    [*system, user],
                    chat_template=template,
                    tokenize=False,
                    add_generation_prompt=rules.generation_prompt,
                    **options,
                )
            )
        except Exception as error:  # a template raises whatever its author chose
            remedy = "leave system_prompt empty" if system else "set system_prompt"
            raise InputError(
                f"encoder {spec.name}: the model's chat template refuses this conversation "
                f"({one_line(error, 200)}); {remedy} or set chat_template: false"
            ) from None

    text = render_dated(render, template, spec.template_date, where)
    before, mark, after = text.partition(CAPTION_MARK)
    if not mark:
        raise InputError(
            f"encoder {spec.name}: the chat template drops the user's text; set "
            "chat_template: false"
        )
    return before, after
