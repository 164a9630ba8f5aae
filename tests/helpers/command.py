"""The `lidit` command, run in this process."""

import sys
from pathlib import Path

from jobs.main import app
from jobs.support.start import guarded


def lidit(*words: str | Path) -> int:
    """Run the command with these words; its exit code."""
    before, sys.argv = sys.argv, ["lidit", *map(str, words)]
    try:
        guarded(app)
    except SystemExit as end:
        return int(end.code or 0)
    finally:
        sys.argv = before
    return 0
