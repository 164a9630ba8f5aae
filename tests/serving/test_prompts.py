"""States of prompts are kept by family and words, within a limit."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from lidit.errors import InputError
from lidit.pipeline.model_encoder import ModelEncoder
from lidit.serving import PromptCache
from tests.helpers.tiny_encoders import tiny_encoders


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ModelEncoder]:
    return tiny_encoders(tmp_path_factory.mktemp("llm"))


class Reads:
    """How many prompts each call gave to the LLM."""

    def __init__(self, encoder: ModelEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[list[str]] = []
        assert encoder.loaded is not None
        tokenizer = encoder.loaded.tokenizer
        before = tokenizer.tokenize

        def counted(captions: list[str]) -> object:
            self.calls.append(list(captions))
            return before(captions)

        monkeypatch.setattr(tokenizer, "tokenize", counted)


def test_threads_never_get_each_others_states(encoders: dict[str, ModelEncoder]) -> None:
    """Two prompts in one LLM at once would take each other's states: somebody's picture of
    another's words.
    """
    prompts = [f"number {number} of {number % 7} cubes" for number in range(48)]
    alone = {prompt: encoders["second"].encode([prompt])[0] for prompt in prompts}
    cache, interval = PromptCache(), sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(8) as threads:
            found = list(
                threads.map(lambda prompt: cache.states(encoders["second"], [prompt])[0], prompts)
            )
    finally:
        sys.setswitchinterval(interval)
    for prompt, states in zip(prompts, found, strict=True):
        torch.testing.assert_close(states, alone[prompt])


def test_a_prompt_is_read_once(
    encoders: dict[str, ModelEncoder], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, encoder = PromptCache(), encoders["second"]
    reads = Reads(encoder, monkeypatch)
    first = cache.states(encoder, ["a cat", "a dog", "a cat"])
    again = cache.states(encoder, ["a dog", "a bird"])
    assert reads.calls == [["a cat", "a dog"], ["a bird"]]
    assert (cache.hits, cache.misses) == (1, 3)
    assert again[0] is first[1]
    assert first[2] is first[0]
    torch.testing.assert_close(first[0], encoder.encode(["a cat"])[0])


def test_no_words_are_kept(encoders: dict[str, ModelEncoder]) -> None:
    cache = PromptCache()
    cache.prompt(encoders, "a cat")
    assert "a cat" not in repr(vars(cache))
    assert b"a cat" not in b"".join(digest for _, digest in cache._kept)
    # Another cache keeps the same prompt at another place: digests of guessed prompts find nothing.
    other = PromptCache()
    other.prompt(encoders, "a cat")
    assert len(cache._kept) == len(other._kept) == 2
    assert not cache._kept.keys() & other._kept.keys()


def test_families_are_never_mistaken_for_each_other(encoders: dict[str, ModelEncoder]) -> None:
    cache = PromptCache()
    states = cache.prompt(encoders, "a cat")
    assert (states["second"] - states["third"]).abs().max() > 0.1
    assert cache.misses == 2
    cache.prompt(encoders, "a cat")
    assert cache.hits == 2


def test_the_least_recently_used_states_go_first(
    encoders: dict[str, ModelEncoder], monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = encoders["second"]
    one = encoder.encode(["cat"])[0].nbytes
    cache = PromptCache(limit=2 * one)
    reads = Reads(encoder, monkeypatch)
    for prompt in ("cat", "cat", "dog", "cat", "sun", "cat", "dog"):
        cache.states(encoder, [prompt])
    lengths = {
        prompt: len(states)
        for prompt in ("cat", "dog", "sun")
        for states in encoder.encode([prompt])
    }
    assert len(set(lengths.values())) == 1, "the test needs prompts of one length"
    assert reads.calls[:4] == [["cat"], ["dog"], ["sun"], ["dog"]]
    assert cache.size == 2 * one


def test_states_larger_than_the_limit_are_given_and_not_kept(
    encoders: dict[str, ModelEncoder],
) -> None:
    cache = PromptCache(limit=10)
    (states,) = cache.states(encoders["second"], ["a cat"])
    assert states.nbytes > 10
    assert cache.size == 0


def test_a_prompt_that_is_no_text_is_refused(encoders: dict[str, ModelEncoder]) -> None:
    with pytest.raises(InputError, match="the request: prompt 1: invalid UTF-8"):
        PromptCache().prompt(encoders, "caf\udce9")
