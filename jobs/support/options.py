"""Options that several commands share, and how their words are read."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from lidit.errors import InputError

SETTING = re.compile(r"[a-z_][a-z0-9_]*(\.[a-z0-9_]+)*=")


def node_labels(words: list[str] | None) -> dict[str, str]:
    """Ray node labels of `--node-label KEY=VALUE`, given any number of times."""
    labels = {}
    for word in words or ():
        key, _, value = word.partition("=")
        if not key or not value:
            raise InputError(f"--node-label {word}: a label is KEY=VALUE, such as lidit/pool=large")
        labels[key] = value
    return labels


def apart(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Words without those that are settings, KEY=VALUE, and those:
    `lidit ingest scenes resolution=32`.

    A file or folder that is called so is a file or folder.
    """
    settings = [word for word in words if SETTING.match(word) and not Path(word).exists()]
    return [word for word in words if word not in settings], settings


def has_tracker() -> bool:
    """Whether a command without a recipe is tracked: only where the environment names a store."""
    return bool(os.environ.get("MLFLOW_TRACKING_URI"))
