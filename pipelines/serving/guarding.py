"""All guards that look at prompts as they are written, the cheapest first: in this process, or a
deployment of them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from lidit.serving.guards.guard import Guard, Verdict
from pipelines.serving.checks import demand, judge
from pipelines.serving.errors import ApiError


class PromptGuards:
    """Guards of texts. Without any, every text passes: whether that may be is for `check_guards` to
    say.
    """

    def __init__(self, guards: Sequence[Guard[str]]) -> None:
        self.guards = tuple(guards)

    async def demand(self, texts: list[str]) -> None:
        """Raises ApiError 400 for a text that is refused, 503 where a guard fails. What a guard
        refuses, no later one is asked about.
        """
        for guard in self.guards:
            await demand(guard, texts, "prompt")

    async def moderate(self, texts: list[str]) -> list[list[Verdict]]:
        """The verdicts of all guards on each text. Raises ApiError 503 where there are none, or one
        fails.
        """
        if not self.guards:
            raise ApiError.of(
                503, "safety_unavailable", "this server was started without a guard of prompts"
            )
        found = await asyncio.gather(*(judge(guard, texts) for guard in self.guards))
        return [list(verdicts) for verdicts in zip(*found, strict=True)]
