"""From captions to token ids: instruction prefix, caption tokens, the empty caption (paper section 3.1, instruction).

The prefix (system prompt, instruction and whatever a chat template puts before the caption) and the caption are
tokenised separately and joined as ids. So the prefix is the same for every caption and its states are computed once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lidit.errors import InputError, one_line
from lidit.text.control import ControlWords, flagged, unflagged
from lidit.text.specs import EncoderSpec
from lidit.text.template_date import render_dated

CAPTION_MARK = "\N{LEFT WHITE LENTICULAR BRACKET}caption\N{RIGHT WHITE LENTICULAR BRACKET}"


@dataclass(frozen=True)
class CaptionTokens:
    """token_ids: at least one, at most the spec's max_tokens; truncated: whether the caption was longer; control:
    whether it spells a control word, which was read as text."""

    token_ids: tuple[int, ...]
    truncated: bool
    control: bool = False


class PromptTokenizer:
    """The tokenizer of one encoder and what it does to prompts. Needs no weights, so it runs on CPU workers.

    prefix_ids: stored and seen by the refiner. context_ids: what the model reads before a caption; the prefix or, where
    there is none, the beginning-of-sequence token. The first token of a sequence is an attention sink with states a
    hundred times larger than any other's: without a token before it, that would be the first word of the caption.
    """

    def __init__(self, spec: EncoderSpec) -> None:
        from transformers import AutoTokenizer

        self.spec = spec
        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(
                spec.folder, local_files_only=True, trust_remote_code=False, padding_side="right"
            )
        except (OSError, ValueError, KeyError, ImportError) as error:
            reason = one_line(error, 200)
            raise InputError(f"{spec.folder}: no tokenizer could be loaded ({reason})") from None
        self.control_words = self._flag_control_words()
        self.prefix_ids = self._prefix()
        self.context_ids: tuple[int, ...] = ()
        if spec.kind != "encoder":
            self.context_ids = self.prefix_ids or (self._first_special("bos_token_id", "eos_token_id"),)
        self.empty_ids = self.tokenize([""])[0].token_ids

    @property
    def pad_id(self) -> int:
        """Stands behind the mask; any valid id would do."""
        return int(self.tokenizer.pad_token_id or 0)

    @property
    def longest(self) -> int:
        """Most tokens of a caption, the model's own special tokens included where they count."""
        own = self.tokenizer.model_max_length if self.spec.kind == "encoder" else self.spec.max_tokens
        return int(min(self.spec.max_tokens, own))

    def _flag_control_words(self) -> ControlWords:
        """Marks what is special by function as special, so that captions cannot reach it; the prefix still does."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is None:  # tokenizers of Python alone read every added token of a caption as text
            return ControlWords(token.content for token in self.tokenizer.added_tokens_decoder.values())
        added = backend.get_added_tokens_decoder()
        # A model may have several templates by name, or none.
        template = str(self.tokenizer.chat_template or "")
        more = unflagged(added, template, Path(self.spec.folder))
        backend.add_special_tokens([flagged(token) for token in more])
        return ControlWords(token.content for token in (*more, *(t for t in added.values() if t.special)))

    def tokenize(self, captions: Sequence[str]) -> list[CaptionTokens]:
        """Token ids of each caption. What spells a control word is read as plain text, and told in `control`."""
        if not captions:
            return []
        whole = self.spec.kind == "encoder"
        rows = self._tokenize_whole(list(captions)) if whole else self._tokenize_bare(list(captions))
        spelled = [self.control_words.spelled_in(caption) for caption in captions]
        return [replace(row, control=True) if found else row for row, found in zip(rows, spelled, strict=True)]

    def _tokenize_bare(self, captions: list[str]) -> list[CaptionTokens]:
        """The captions' own tokens; what stands before them is the prefix."""
        rows = self.tokenizer(captions, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        limit = self.spec.max_tokens
        return [CaptionTokens(tuple(ids[:limit]) or (self._nothing(),), len(ids) > limit) for ids in rows]

    def _tokenize_whole(self, captions: list[str]) -> list[CaptionTokens]:
        """With the model's own special tokens around the caption, as encoders expect it; they count as tokens."""
        longest = self.longest
        options = {"truncation": True, "max_length": longest, "split_special_tokens": True}
        rows = self.tokenizer(captions, **options)["input_ids"]
        full = [i for i, ids in enumerate(rows) if len(ids) >= longest]  # only these can have been longer
        whole = (
            self.tokenizer([captions[i] for i in full], split_special_tokens=True, verbose=False)["input_ids"]
            if full
            else []
        )
        cut = {i for i, ids in zip(full, whole, strict=True) if len(ids) > longest}
        return [CaptionTokens(tuple(ids) or (self._nothing(),), i in cut) for i, ids in enumerate(rows)]

    def _nothing(self) -> int:
        """What an empty caption is read as: the end of the text."""
        return self._first_special("eos_token_id", "bos_token_id")

    def _first_special(self, *names: str) -> int:
        for name in (*names, "cls_token_id", "pad_token_id", "unk_token_id"):
            found = getattr(self.tokenizer, name, None)
            if found is not None:
                return int(found)
        raise InputError(
            f"{self.spec.folder}: the tokenizer has no special token, so it cannot encode an empty caption or "
            "a prompt without instruction; choose a model whose tokenizer has an end-of-text token"
        )

    def _prefix(self) -> tuple[int, ...]:
        spec = self.spec
        if spec.chat_template:
            ids = self.tokenizer(self._templated(), add_special_tokens=False)["input_ids"]
            return tuple(ids)
        parts = [part for part in (spec.system_prompt, spec.instruction) if part]
        if not parts:
            return ()
        # The line break keeps the last word of the prefix and the first of the caption apart in every tokenizer.
        ids = self.tokenizer("\n".join(parts) + "\n", add_special_tokens=True)["input_ids"]
        if ids and ids[-1] in (self.tokenizer.eos_token_id, self.tokenizer.sep_token_id):
            ids = ids[:-1]  # the text goes on with the caption
        return tuple(ids)

    def _templated(self) -> str:
        """The conversation up to where the caption begins."""
        spec = self.spec
        if not self.tokenizer.chat_template:
            raise InputError(
                f"encoder {spec.name}: {spec.folder} has no chat template (a base model?); set chat_template: false"
            )
        user = {"role": "user", "content": "\n".join(part for part in (spec.instruction, CAPTION_MARK) if part)}
        system = [{"role": "system", "content": spec.system_prompt}] if spec.system_prompt else []

        def render(template: str) -> str:
            try:
                conversation = [*system, user]
                return str(self.tokenizer.apply_chat_template(conversation, chat_template=template, tokenize=False))
            except Exception as error:  # a template raises whatever its author chose
                remedy = "leave system_prompt empty" if system else "set system_prompt"
                raise InputError(
                    f"encoder {spec.name}: the model's chat template refuses this conversation "
                    f"({one_line(error, 200)}); {remedy} or set chat_template: false"
                ) from None

        where = f"encoder {spec.name}: {spec.folder}"
        text = render_dated(render, self.tokenizer.get_chat_template(), spec.template_date, where)
        before, mark, _ = text.partition(CAPTION_MARK)
        if not mark:
            raise InputError(f"encoder {spec.name}: the chat template drops the user's text; set chat_template: false")
        return before
