"""Links to pictures that need no header, so a page can show them: signed, bound to a key, over
after a time.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time
from collections.abc import Callable, Mapping

from pipelines.serving.errors import missing

SECRET_BYTES = 32


class Links:
    """The secret is made anew with every start: the pictures are gone by then, too."""

    def __init__(self, keep_s: float, clock: Callable[[], float] = time.time) -> None:
        self.keep_s, self._clock = keep_s, clock
        self._secret = secrets.token_bytes(SECRET_BYTES)

    def make(self, key: str, job: str, image: int) -> str:
        """The path and query of a picture's link."""
        until = int(self._clock() + self.keep_s)
        signature = self._sign(key, job, image, until)
        return f"/v1/files/{job}/{image}?key={key}&until={until}&signature={signature}"

    def key_of(self, job: str, image: int, words: Mapping[str, str]) -> str:
        """The id of the key that the link was made for. Raises ApiError 404 for one that was
        changed or is over.
        """
        key, until, signature = (words.get(name, "") for name in ("key", "until", "signature"))
        if not (until.isascii() and until.isdigit() and len(until) < 12 and signature.isascii()):
            raise missing("this picture")
        own = self._sign(key, job, image, int(until))
        if not hmac.compare_digest(own, signature) or int(until) <= self._clock():
            raise missing("this picture")
        return key

    def _sign(self, key: str, job: str, image: int, until: int) -> str:
        return hmac.new(
            self._secret, f"{job}/{image}/{key}/{until}".encode(), hashlib.sha256
        ).hexdigest()
