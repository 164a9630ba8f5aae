"""A model behind an address as a reward: it is shown the picture and asked whether it shows its
prompt.

The server speaks OpenAI's chat completions, as vLLM, SGLang and others do. Where it tells the
log-probabilities of its first word, the reward is that of yes against no; otherwise it is 1 or 0.
"""

from __future__ import annotations

import base64
import io
import json
import math
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from PIL import Image

from lidit.config.align import RewardSettings
from lidit.errors import InputError, JobError, one_line
from lidit.evals.rewards.base import Pictures, Record

AT_ONCE = 8  # questions on their way
TRIES, PAUSE = 3, 1.0  # seconds, doubled after each try
WORDS = {"yes": True, "no": False}


class VqaReward:
    """Asks `settings.url` about every picture. Raises JobError where the server gives no usable
    answer.
    """

    def __init__(self, settings: RewardSettings) -> None:
        assert settings.url is not None
        self.settings, self.address = settings, f"{settings.url.rstrip('/')}/chat/completions"

    def __call__(self, pictures: Pictures, records: Sequence[Record]) -> list[float]:
        with ThreadPoolExecutor(AT_ONCE) as pool:
            return list(pool.map(self._of, pictures, (str(record["prompt"]) for record in records)))

    def _of(self, picture: Any, prompt: str) -> float:
        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, "PNG")
        shown = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
        question = self.settings.question.replace("{prompt}", prompt)
        content = [
            {"type": "image_url", "image_url": {"url": shown}},
            {"type": "text", "text": question},
        ]
        answer = self._post(
            {
                "model": self.settings.model,
                "messages": [{"role": "user", "content": content}],
                "max_tokens": 1,
                "temperature": 0,
                "logprobs": True,
                "top_logprobs": 5,
            }
        )
        value = probability_of_yes(answer)
        if value is None:
            raise JobError(
                f"{self.address}: the answer begins with neither yes nor no; change reward.question"
            )
        return value

    def _post(self, body: dict[str, Any]) -> Any:
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(self.settings.key_variable):
            headers["Authorization"] = f"Bearer {key}"
        request = Request(self.address, json.dumps(body).encode(), headers)
        for number in range(TRIES):
            if number:
                time.sleep(PAUSE * 2 ** (number - 1))  # for a server that restarts or is too busy
            try:
                with urlopen(request, timeout=self.settings.timeout) as reply:
                    return json.load(reply)
            except HTTPError as error:
                if error.code < 500 and error.code != 429:
                    raise InputError(
                        f"{self.address}: refused the question ({error.code} {error.reason})"
                    ) from None
                reason = f"{error.code} {error.reason}"
            except (OSError, ValueError) as error:
                reason = one_line(error, 120)
        raise JobError(
            f"{self.address}: no answer after {TRIES} tries ({reason}); the run goes on "
            "when it is back"
        )


def probability_of_yes(answer: Any) -> float | None:
    """P(yes) / (P(yes) + P(no)) of the answer's first word; None where it is neither."""
    try:
        choice = answer["choices"][0]
        listed = ((choice.get("logprobs") or {}).get("content") or [{}])[0].get(
            "top_logprobs"
        ) or []
        mass = {True: 0.0, False: 0.0}
        for entry in listed:
            word = WORDS.get(str(entry["token"]).strip().lower())
            if word is not None:
                mass[word] += math.exp(float(entry["logprob"]))
        if sum(mass.values()) > 0:
            return mass[True] / sum(mass.values())
        said = WORDS.get(str(choice["message"]["content"]).strip().strip(".!,").lower())
    except (LookupError, TypeError, ValueError, AttributeError):
        return None
    return None if said is None else float(said)
