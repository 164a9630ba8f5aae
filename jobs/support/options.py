"""Options that several commands share, and how their words are read."""

from __future__ import annotations

from lidit.errors import InputError


def node_labels(words: list[str] | None) -> dict[str, str]:
    """Ray node labels of `--node-label KEY=VALUE`, given any number of times."""
    labels = {}
    for word in words or ():
        key, _, value = word.partition("=")
        if not key or not value:
            raise InputError(f"--node-label {word}: a label is KEY=VALUE, such as lidit/pool=large")
        labels[key] = value
    return labels
