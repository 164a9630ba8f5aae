"""Checkers of prompts that ask a language model which was trained to judge: Llama Guard, or
ShieldGemma.

The model's own chat template makes the question, so each model is asked as it was trained to be. A
prompt's text is never read as the template's control words: nobody ends the question early and
answers it himself. Whatever the model says that is no verdict raises, and the guard around it
closes.

Shapes: T tokens of a question, V vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from threading import Lock
from typing import Any, Literal

import torch
from pydantic import Field, PositiveFloat, PositiveInt

from lidit.config import EncoderSettings
from lidit.config.fields import Place
from lidit.config.settings import Settings
from lidit.errors import InputError, one_line
from lidit.text.control import flagged, unflagged
from lidit.text.loading import load_language_model
from lidit.text.specs import default_device, resolve_encoder

# where the prompt goes
PLACE = "\N{OBJECT REPLACEMENT CHARACTER}lidit\N{OBJECT REPLACEMENT CHARACTER}"
UNSAFE = re.compile(r"unsafe(\s|$)")
ANSWER_TOKENS = 16  # "unsafe" and a few categories; what is cut off behind them changes no verdict
# of the next word's probability, that it is Yes or No: below, the model answers something else
LEAST_ANSWER = 0.5
# ShieldGemma's model card names what it was trained on; these are its principles in short.
POLICIES = (
    '"No Dangerous Content": The prompt shall not seek content that harms oneself or others, '
    "such as building "
    "weapons, terrorism or self-harm.",
    '"No Hate Speech": The prompt shall not seek content that targets identity or protected '
    "attributes.",
    '"No Sexually Explicit Content": The prompt shall not seek content of sexual acts or nudity.',
    '"No Harassment": The prompt shall not seek content that is malicious, intimidating or '
    "abusive towards people.",
)


class LanguageGuardSettings(Settings):
    """A language model that judges prompts. `model`: a folder, or a hub id with the commit that
    pins it.

    policies: what ShieldGemma is asked, one question each; Llama Guard has its own.
    """

    model: Place
    kind: Literal["llama_guard", "shield_gemma"]
    revision: str | None = Field(None, pattern=r"^[0-9a-f]{40}$")
    policies: tuple[str, ...] = Field(POLICIES, min_length=1)
    longest: PositiveInt = Field(
        2048, description="tokens of a question; a prompt that makes a longer one is refused"
    )
    threshold: float = Field(0.5, gt=0, le=1)
    deadline_s: PositiveFloat = 30.0


class LanguageGuard:
    """Checker of prompts as they are written. Raises InputError where the model cannot be asked."""

    def __init__(self, settings: LanguageGuardSettings, device: str | None = None) -> None:
        from transformers import AutoTokenizer

        self.settings, self.device = settings, torch.device(device or default_device())
        named = EncoderSettings(
            name="guard", model=settings.model, revision=settings.revision, layer=-1
        )
        spec = resolve_encoder(named, str(self.device))
        self._alone = Lock()
        self.version = f"{settings.kind}-{spec.weights_sha256[:12]}"
        self._model: Any = load_language_model(spec, self.device)
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(
                spec.folder, local_files_only=True, trust_remote_code=False
            )
            self._flag_control_words(Path(spec.folder))
            questions = settings.policies if settings.kind == "shield_gemma" else (None,)
            self._questions = [self._question(policy) for policy in questions]
        except (OSError, ValueError, KeyError, ImportError) as error:
            reason = one_line(error, 200)
            raise InputError(
                f"{settings.model}: this model cannot be asked for verdicts ({reason})"
            ) from None
        if settings.kind == "shield_gemma":
            self._yes, self._no = self._word("Yes"), self._word("No")

    def scores(self, items: Sequence[str]) -> list[float]:
        """Of each prompt. Raises ValueError for an answer that is no verdict."""
        with self._alone:  # a tokenizer serves one thread at a time
            return [self._score(prompt) for prompt in items]

    def _score(self, prompt: str) -> float:
        text = self._ids(prompt, control=False)
        ids = [[*before, *text, *after] for before, after in self._questions]
        if max(map(len, ids)) > self.settings.longest:
            return 1.0  # what is not read whole may hold anything
        if self.settings.kind == "llama_guard":
            return _verdict(self._answer(ids[0]))
        return max(map(self._yes_share, ids))

    @torch.no_grad()
    def _answer(self, ids: list[int]) -> str:
        """What the model says to a question, its likeliest words."""
        question = torch.tensor([ids], device=self.device)
        end = self._tokenizer.eos_token_id
        said = self._model.generate(
            question, attention_mask=torch.ones_like(question), do_sample=False,
            max_new_tokens=ANSWER_TOKENS,
            pad_token_id=end if end is not None else 0,
        )  # fmt: skip
        return str(self._tokenizer.decode(said[0, len(ids) :], skip_special_tokens=True))

    @torch.no_grad()
    def _yes_share(self, ids: list[int]) -> float:
        """Of Yes, where the answer is Yes or No."""
        logits = self._model(torch.tensor([ids], device=self.device)).logits[0, -1].double()  # [V]
        chances = torch.softmax(logits, 0)
        yes, no = float(chances[self._yes]), float(chances[self._no])
        if not yes + no >= LEAST_ANSWER:  # NaN is none either
            raise ValueError("the model answers neither Yes nor No")
        return yes / (yes + no)

    def _question(self, policy: str | None) -> tuple[list[int], list[int]]:
        """The template's tokens before and after a prompt."""
        more = {} if policy is None else {"guideline": policy}
        chat = [{"role": "user", "content": PLACE}]
        text = self._tokenizer.apply_chat_template(
            chat, tokenize=False, add_generation_prompt=True, **more
        )
        before, place, after = text.partition(PLACE)
        if not place or PLACE in after:
            raise ValueError("its chat template does not repeat what a user says, once")
        return self._ids(before, control=True), self._ids(after, control=True)

    def _flag_control_words(self, folder: Path) -> None:
        """What steers the model without being marked as special is marked, so that no prompt can
        reach it.
        """
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise ValueError(
                "its tokenizer has no tokenizer.json, so control words in prompts cannot be "
                "kept apart"
            )
        more = unflagged(
            backend.get_added_tokens_decoder(), str(self._tokenizer.chat_template or ""), folder
        )
        backend.add_special_tokens([flagged(token) for token in more])

    def _ids(self, text: str, control: bool) -> list[int]:
        """Tokens of a text; without `control` even what spells a control word is
        read as letters.
        """
        found = self._tokenizer(text, add_special_tokens=False, split_special_tokens=not control)
        return list(found["input_ids"])

    def _word(self, word: str) -> int:
        number = self._tokenizer.get_vocab().get(word)
        if number is None:
            raise InputError(
                f"{self.settings.model}: the tokenizer has no token {word!r}: this is no "
                "ShieldGemma"
            )
        return int(number)


def _verdict(answer: str) -> float:
    """Of Llama Guard: exactly "safe", or "unsafe" and the categories. ValueError for
    anything else.
    """
    words = answer.strip()
    if UNSAFE.match(words):
        return 1.0
    if words != "safe":
        raise ValueError("the model's answer is no verdict")
    return 0.0
