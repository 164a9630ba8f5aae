"""States of prompts, kept for the next request with the same words.

Shapes: T caption tokens, W width of an LLM.
"""

from __future__ import annotations

import hashlib
import secrets
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from threading import Lock

import torch

from lidit.config.fields import check_prompts
from lidit.pipeline.model_encoder import ModelEncoder

Key = tuple[str, bytes]  # the family's fingerprint, and a keyed digest of the prompt
States = dict[str, torch.Tensor]


class PromptCache:
    """The least recently used states go first. Any number of threads and models may share a cache.

    The key holds the text family's fingerprint: models that were trained on the same states share
    them, and no other LLM, layer, instruction or rounding is ever mistaken for them. No words are
    kept: a prompt's place is a digest by a key that this cache alone has.

    Args:
        limit: bytes of states that are kept.

    `reading` is held while an LLM reads, with its tokenizer: neither serves two threads at once.
    """

    def __init__(self, limit: int = 256 << 20) -> None:
        self.limit = limit
        self.size, self.hits, self.misses = 0, 0, 0
        self._kept: OrderedDict[Key, torch.Tensor] = OrderedDict()
        self._lock = Lock()
        self.reading = Lock()
        self._secret = secrets.token_bytes(32)

    def prompt(
        self, encoders: Mapping[str, ModelEncoder], prompt: str, device: str | None = None
    ) -> States:
        """Encoder name -> states [T, W] of one prompt: what a `Request` takes. Raises InputError
        for no text.
        """
        check_prompts([prompt], "the request")
        return {
            name: self.states(encoder, [prompt], device)[0] for name, encoder in encoders.items()
        }

    def states(
        self, encoder: ModelEncoder, prompts: Sequence[str], device: str | None = None
    ) -> list[torch.Tensor]:
        """States [T_i, W] of each prompt, as `encoder.encode` gives them; prompts that are not kept
        go to the LLM at once, each once. Never change a tensor in place: others have the same.
        """
        found: dict[str, torch.Tensor] = {}
        with self._lock:
            for prompt in dict.fromkeys(prompts):
                key = self._key(encoder, prompt)
                if (states := self._kept.get(key)) is not None:
                    self._kept.move_to_end(key)
                    found[prompt] = states
            missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in found]
            self.hits += len(found)
            self.misses += len(missing)
        # The LLM runs outside the lock: a prompt that is kept never waits for another that is not.
        if missing:
            # Copies of their own: a view would keep the states of its whole batch in memory. One
            # call at a time: an LLM notes its blocks' outputs in itself, and two calls would take
            # each other's.
            with self.reading:
                encoded = [states.clone() for states in encoder.encode(missing, device)]
            found.update(zip(missing, encoded, strict=True))
            with self._lock:
                for prompt, states in zip(missing, encoded, strict=True):
                    self._keep(self._key(encoder, prompt), states)
        return [found[prompt] for prompt in prompts]

    def _key(self, encoder: ModelEncoder, prompt: str) -> Key:
        words = prompt.encode("utf-8", "surrogatepass")
        return encoder.fingerprint, hashlib.blake2b(
            words, key=self._secret, digest_size=32
        ).digest()

    def _keep(self, key: Key, states: torch.Tensor) -> None:
        """Put states in, and the oldest out until the limit holds; states larger than it are not
        kept.
        """
        before = self._kept.pop(key, None)
        self.size += states.nbytes - (0 if before is None else before.nbytes)
        self._kept[key] = states
        while self.size > self.limit:
            _, oldest = self._kept.popitem(last=False)
            self.size -= oldest.nbytes
