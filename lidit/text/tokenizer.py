"""From captions to token ids: instruction prefix, caption tokens, the empty caption (paper
section 3.1, instruction).

The prefix (system prompt, instruction and whatever a chat template puts before the caption) and the
caption are tokenised separately and joined as ids. So the prefix is the same for every caption and
its states are computed once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lidit.errors import InputError, one_line
from lidit.text.cleaning import clean, split_quoted
from lidit.text.control import ControlWords, flagged, unflagged
from lidit.text.specs import EncoderSpec
from lidit.text.template import Template, template_of


@dataclass(frozen=True)
class CaptionTokens:
    """token_ids: the caption's, and the suffix's and padding's where the spec stores them;
    truncated: whether the caption was longer than the spec's max_tokens; control: whether it spells
    a control word, which was read as text;
    merged: whether the tokenizer makes other tokens of the caption and the text around it, taken
    together.
    """

    token_ids: tuple[int, ...]
    truncated: bool
    control: bool = False
    merged: bool = False


class PromptTokenizer:
    """The tokenizer of one encoder and what it does to prompts. Needs no weights, so it runs on CPU
    workers.

    prefix_ids: stored and seen by the refiner. context_ids: what the model reads before a caption;
    the prefix or, where there is none, the beginning-of-sequence token. The first token of a
    sequence is an attention sink with states a hundred times larger than any other's: without a
    token before it, that would be the first word of the caption.
    A bare template has neither: its captions are read with the tokenizer's own special tokens
    alone. suffix_ids: what follows every caption.
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
        self.template: Template | None = template_of(spec, self.tokenizer)
        self._own_first, self._own_last = self._own_specials()
        # Padding on the left stands before the instruction, which then has no place of its own.
        self._in_rows = spec.text.padding is not None and spec.text.padding.side == "left"
        self._before = self._prefix()
        self.suffix_ids = self._suffix()
        self.prefix_ids = () if self._in_rows else self._before
        self.context_ids = self.prefix_ids
        if (
            spec.kind != "encoder"
            and not self.prefix_ids
            and not self._in_rows
            and not self._is_bare
        ):
            self.context_ids = (self._first_special("bos_token_id", "eos_token_id"),)
        self._filling = self._filling_id()
        self.empty_ids = self.tokenize([""])[0].token_ids

    @property
    def pad_id(self) -> int:
        """Stands behind the mask; any valid id would do."""
        return int(self.tokenizer.pad_token_id or 0)

    def _filling_id(self) -> int:
        """The token of the padding that the spec stores; -1 without such."""
        rule = self.spec.text.padding
        if rule is None:
            return -1
        if isinstance(rule.token, int):
            name = f"token {rule.token}"
            found = rule.token if rule.token < len(self.tokenizer) else None
        else:
            name = f"{rule.token} token"
            found = getattr(self.tokenizer, f"{rule.token}_token_id")
        if found is None:
            raise InputError(
                f"{self.spec.folder}: the tokenizer has no {name} to make this "
                "encoder's padding of; take "
                "the tokenizer that the system comes with, or set padding.token"
            )
        return int(found)

    @property
    def _is_bare(self) -> bool:
        """Whether nothing but the tokenizer's own special tokens stands around a caption."""
        template = self.template
        return (
            template is not None
            and template.specials
            and not (template.before or template.after or template.gap)
        )

    @property
    def _limit(self) -> int:
        """Most tokens of a caption, the model's own special tokens included where they count."""
        own = (
            self.tokenizer.model_max_length if self.spec.kind == "encoder" else self.spec.max_tokens
        )
        return int(min(self.spec.max_tokens, own))

    @property
    def longest(self) -> int:
        """Most tokens behind the context."""
        rules = self.spec.text
        if rules.counted == "whole":
            longest = self._limit - len(self.context_ids)
        else:
            behind = len(self._stored_suffix) if rules.counted == "caption" else 0
            longest = self._limit + behind + (len(self._before) if self._in_rows else 0)
        return longest + (rules.padding.multiple_of or 1) - 1 if rules.padding else longest

    @property
    def _stored_suffix(self) -> tuple[int, ...]:
        return self.suffix_ids if self.spec.text.suffix == "kept" else ()

    def _flag_control_words(self) -> ControlWords:
        """Marks what is special by function as special, so that captions cannot reach it; the
        prefix still does.
        """
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        # tokenizers of Python alone read every added token of a caption as text
        if backend is None:
            return ControlWords(
                token.content for token in self.tokenizer.added_tokens_decoder.values()
            )
        added = backend.get_added_tokens_decoder()
        # A model may have several templates by name, or none.
        template = str(self.tokenizer.chat_template or "")
        more = unflagged(added, template, Path(self.spec.folder))
        backend.add_special_tokens([flagged(token) for token in more])
        return ControlWords(
            token.content for token in (*more, *(t for t in added.values() if t.special))
        )

    def tokenize(self, captions: Sequence[str]) -> list[CaptionTokens]:
        """Token ids of each caption. What spells a control word is read as plain text, and told in
        `control`.
        """
        if not captions:
            return []
        texts = [clean(caption, self.spec.text.clean) for caption in captions]
        if self.spec.kind == "encoder" or self._is_bare:
            rows = self._tokenize_whole([text or "" for text in texts])
        elif self.template is not None and (
            self.template.specials or self.spec.text.suffix is not None
        ):
            rows = self._tokenize_between([text or "" for text in texts])
        else:
            rows = self._tokenize_bare([text or "" for text in texts])
        if self.spec.text.padding is not None:
            rows = [replace(row, token_ids=self._filled(row.token_ids)) for row in rows]
        rows = [
            CaptionTokens((), False) if text is None else row
            for text, row in zip(texts, rows, strict=True)
        ]
        spelled = [self.control_words.spelled_in(caption) for caption in captions]
        return [
            replace(row, control=True, merged=False) if found else row
            for row, found in zip(rows, spelled, strict=True)
        ]

    def _tokenize_bare(self, captions: list[str]) -> list[CaptionTokens]:
        """The captions' own tokens; what stands before them is the prefix."""
        rows = self._ids(captions)
        limit = self.spec.max_tokens
        return [
            CaptionTokens(tuple(ids[:limit]) or self._nothing(), len(ids) > limit, merged=joint)
            for ids, joint in zip(rows, self._merged(captions, rows), strict=True)
        ]

    def _tokenize_whole(self, captions: list[str]) -> list[CaptionTokens]:
        """With the model's own special tokens around the caption, as encoders expect it; they count
        as tokens.
        """
        longest = self._limit
        options = {"truncation": True, "max_length": longest, "split_special_tokens": True}
        rows = self.tokenizer(captions, **options)["input_ids"]
        # only these can have been longer
        full = [i for i, ids in enumerate(rows) if len(ids) >= longest]
        whole = (
            self.tokenizer([captions[i] for i in full], split_special_tokens=True, verbose=False)[
                "input_ids"
            ]
            if full
            else []
        )
        cut = {i for i, ids in zip(full, whole, strict=True) if len(ids) > longest}
        empty = self._nothing() if any(not ids for ids in rows) else ()
        replaced = self.spec.text.empty is not None  # then whatever the tokenizer makes of no text
        return [
            CaptionTokens(
                self._nothing() if replaced and not text else tuple(ids) or empty, i in cut
            )
            for i, (text, ids) in enumerate(zip(captions, rows, strict=True))
        ]

    def _tokenize_between(self, captions: list[str]) -> list[CaptionTokens]:
        """The captions' tokens and those of the template behind them."""
        assert self.template is not None
        rules, suffix = self.spec.text, self._stored_suffix
        texts = [self.template.gap + caption for caption in captions]
        rows = [self._spelled(text) for text in texts] if rules.spell_quoted else self._ids(texts)
        merged = [False] * len(rows) if rules.spell_quoted else self._merged(captions, rows)
        limit = self.spec.max_tokens - (len(self._before) if rules.counted == "whole" else 0)
        found = []
        replaced = rules.empty is not None  # then whatever spaces of the template stand for no text
        for caption, ids, joint in zip(captions, rows, merged, strict=True):
            row = list(self._nothing()) if not ids or (replaced and not caption) else ids
            if rules.counted == "caption":
                stored, cut = [*row[:limit], *suffix], len(row) > limit
            else:
                stored, cut = [*row, *suffix][:limit], len(row) + len(suffix) > limit
            before = self._before if self._in_rows else ()
            found.append(CaptionTokens((*before, *stored), cut, merged=joint))
        return found

    def _ids(self, texts: list[str]) -> list[list[int]]:
        """Tokens of texts alone; what looks like a control word is text."""
        rows: list[list[int]] = self.tokenizer(
            texts, add_special_tokens=False, split_special_tokens=True
        )["input_ids"]
        return rows

    def _spelled(self, text: str) -> list[int]:
        return [number for ids in self._ids(split_quoted(text)) for number in ids] if text else []

    def _merged(self, captions: list[str], rows: list[list[int]]) -> list[bool]:
        """Whether the text around a caption and the caption give other tokens
        together than apart.
        """
        template = self.template
        if template is None and not self._before:
            return [False] * len(rows)
        before, after = (
            (template.before + template.gap, template.after)
            if template
            else (self._instruction, "")
        )
        specials = template is None or template.specials
        whole = self.tokenizer(
            [before + text + after for text in captions], add_special_tokens=specials, verbose=False
        )
        behind = self._own_last if template is None else self.suffix_ids
        joined = zip(whole["input_ids"], rows, strict=True)
        return [list(ids) != [*self._before, *row, *behind] for ids, row in joined]

    @property
    def _instruction(self) -> str:
        """The text before a caption that no template writes."""
        parts = [part for part in (self.spec.system_prompt, self.spec.instruction) if part]
        # The line break keeps the last word of the prefix and the first of the caption apart in
        # every tokenizer.
        return "\n".join(parts) + "\n" if parts else ""

    def _filled(self, ids: tuple[int, ...]) -> tuple[int, ...]:
        """With the padding that the spec stores."""
        rule = self.spec.text.padding
        assert rule is not None
        own = 0 if self._in_rows or self.spec.text.counted != "whole" else len(self._before)
        if rule.multiple_of is not None:
            missing = -(len(ids) + own) % rule.multiple_of
        else:
            missing = self.longest - len(ids)
        padding = (self._filling,) * missing
        return (*padding, *ids) if rule.side == "left" else (*ids, *padding)

    def without_padding(self, ids: Sequence[int]) -> int:
        """Tokens of a row before the padding that the spec stores behind it."""
        end = len(ids)
        while end and ids[end - 1] == self._filling:
            end -= 1
        own = (
            [*self._own_last, *self._stored_suffix] if self._is_whole else list(self._stored_suffix)
        )
        # a tokenizer may end texts with the token that it pads with
        while own and own[-1] == self._filling:
            own.pop()
            end += 1
        return min(end, len(ids))

    def padding_before(self, ids: Sequence[int]) -> int:
        """Tokens of the padding that a row begins with."""
        return next(
            (place for place, number in enumerate(ids) if number != self._filling), len(ids)
        )

    @property
    def _is_whole(self) -> bool:
        return self.spec.kind == "encoder" or self._is_bare

    def _nothing(self) -> tuple[int, ...]:
        """What an empty caption is read as: by default the end of the text, where nothing else is
        stored.
        """
        empty = self.spec.text.empty
        if isinstance(empty, int):
            return (empty,)
        if empty == "nothing" or (empty is None and self._stored_suffix):
            return ()
        if empty == "bos":
            if self.tokenizer.bos_token_id is None:
                raise InputError(
                    f"{self.spec.folder}: the tokenizer has no beginning-of-text token, which "
                    "empty: bos asks for; set "
                    "empty to the id of a token"
                )
            return (int(self.tokenizer.bos_token_id),)
        return (self._first_special("eos_token_id", "bos_token_id"),)

    def _first_special(self, *names: str) -> int:
        for name in (*names, "cls_token_id", "pad_token_id", "unk_token_id"):
            found = getattr(self.tokenizer, name, None)
            if found is not None:
                return int(found)
        raise InputError(
            f"{self.spec.folder}: the tokenizer has no special token, so it cannot encode an "
            "empty caption or "
            "a prompt without instruction; choose a model whose tokenizer has an end-of-text token"
        )

    def _own_specials(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """What the tokenizer puts before and behind every text."""
        text, bare = (
            self.tokenizer("x")["input_ids"],
            self.tokenizer("x", add_special_tokens=False)["input_ids"],
        )
        for start in range(len(text) - len(bare) + 1):
            if text[start : start + len(bare)] == bare:
                return tuple(text[:start]), tuple(text[start + len(bare) :])
        return (), ()

    def _prefix(self) -> tuple[int, ...]:
        template = self.template
        if template is not None:
            if not template.before:
                return () if self._is_bare or not template.specials else self._own_first
            ids = self.tokenizer(template.before, add_special_tokens=False)["input_ids"]
            return (*(self._own_first if template.specials else ()), *ids)
        if not self._instruction:
            return ()
        ids = self.tokenizer(self._instruction, add_special_tokens=True)["input_ids"]
        if ids and ids[-1] in (self.tokenizer.eos_token_id, self.tokenizer.sep_token_id):
            ids = ids[:-1]  # the text goes on with the caption
        return tuple(ids)

    def _suffix(self) -> tuple[int, ...]:
        """What follows a caption; nothing where a spec does not read it."""
        template = self.template
        if template is None or self._is_bare or not (template.specials or self.spec.text.suffix):
            return ()
        ids = (
            self.tokenizer(template.after, add_special_tokens=False)["input_ids"]
            if template.after
            else []
        )
        return (*ids, *(self._own_last if template.specials else ()))
