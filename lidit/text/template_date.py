"""Chat templates that ask for today's date: read with a fixed one, or noticed.

transformers hands `strftime_now` to every template. Calls of it are written over in the template's
text by the date that they would print, so the clock is never asked.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from datetime import date

from lidit.errors import InputError

CLOCK = re.compile(r"strftime_now\s*\(")
LITERAL = re.compile(r"""strftime_now\s*\(\s*(["'])([^"'\\]*)\1\s*\)""")
TRIALS = (date(2001, 2, 3), date(2014, 11, 25))  # differ in day, month, year and weekday


def render_dated(render: Callable[[str], str], template: str, fixed: str | None, where: str) -> str:
    """What `render` makes of a template on the fixed date (YYYY-MM-DD).

    Raises:
        InputError: No date is fixed and the text depends on it, or the template computes the format
            of a date.
    """
    if not CLOCK.search(template):
        return render(template)
    days = [date.fromisoformat(fixed)] if fixed else list(TRIALS)
    texts = []
    for day in days:
        dated = LITERAL.sub(lambda call, day=day: json.dumps(day.strftime(call[2])), template)  # type: ignore[misc]
        if CLOCK.search(dated):
            raise InputError(
                f"{where}: the chat template prints today's date in a format that it computes, "
                "so it cannot be fixed; "
                "set chat_template: false"
            )
        texts.append(render(dated))
    if len(set(texts)) > 1:
        raise InputError(
            f"{where}: the chat template prints today's date, so the instruction would change "
            "from day to day; "
            "set template_date: YYYY-MM-DD"
        )
    return texts[0]
