"""The commit of the code that runs."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path


def git_state() -> dict[str, str]:
    """Commit and cleanliness of the checkout this code runs from; LIDIT_GIT_COMMIT where there is
    none.

    The variable is set by whatever took the code away from its checkout: an image's build,
    `lidit submit`.
    """
    folder = Path(__file__).parent

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", *words], cwd=folder, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        # not somebody else's checkout around an installation
        git("ls-files", "--error-unmatch", Path(__file__).name)
        return {
            "git.commit": git("rev-parse", "HEAD"),
            "git.dirty": str(bool(git("status", "--porcelain"))).lower(),
        }
    except (OSError, subprocess.CalledProcessError):
        commit = os.environ.get("LIDIT_GIT_COMMIT", "")
        return {"git.commit": commit} if commit else {}
