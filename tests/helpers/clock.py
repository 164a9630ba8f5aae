"""A clock that stands until a test moves it."""

from lidit.serving.keys import DAY

NOON = 20_000 * DAY + DAY / 2  # the middle of a quota's period


class Clock:
    """Seconds since 1970; `now` is free to be set."""

    def __init__(self) -> None:
        self.now: float = NOON

    def __call__(self) -> float:
        return self.now
