"""What commands write: nothing that a name, a caption or a server's reply could steer the terminal
with.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator
from typing import Any, TextIO

from lidit.errors import plain


class PlainStream:
    """A text stream that writes control characters out.

    Bars, tables and help come from rich, which writes to `rich_proxied_file`: their colours and
    cursor stay.
    """

    def __init__(self, stream: TextIO) -> None:
        self.rich_proxied_file = stream

    def write(self, text: str) -> int:
        """As a file's; a leading carriage return begins a line anew, as progress bars of libraries
        do.
        """
        begin = "\r" if text.startswith("\r") else ""
        body = plain(text.removeprefix(begin))
        encoding = getattr(self.rich_proxied_file, "encoding", None) or "utf-8"
        self.rich_proxied_file.write(
            begin + body.encode(encoding, "backslashreplace").decode(encoding)
        )
        return len(text)

    def writelines(self, lines: Iterator[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.rich_proxied_file, name)


class PlainFormatter(logging.Formatter):
    """Log lines, tracebacks in them too, without control characters."""

    def format(self, record: logging.LogRecord) -> str:
        return plain(super().format(record))


@contextlib.contextmanager
def plain_streams() -> Iterator[None]:
    """Standard output and error as plain streams inside the `with` block."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = PlainStream(sys.stdout), PlainStream(sys.stderr)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
