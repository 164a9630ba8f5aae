"""Ray Train's list of a run's checkpoints, made to agree with the folders on disk.

Ray uses it to delete old checkpoints, and refuses to start where it names a folder that is gone.
Which checkpoint a run goes on from is found on the disk (`checkpoints.newest_complete`), never
here.
"""

from __future__ import annotations

import json
import logging
import shutil
import sys
from pathlib import Path
from typing import Any

import ray

from pipelines.training import checkpoints

log = logging.getLogger(__name__)
WORST = sys.float_info.max  # a loss nobody has measured yet: JSON has no infinity


def agree(folder: Path, newest: Path | None) -> None:
    """Make way for a start from `newest`: newer checkpoints go, Ray's list names the rest.

    Checkpoints that were never finished are removed, damaged ones get another name: their steps
    are taken again, and two entries of one folder would have Ray delete the good one with the old
    one.
    """
    for path in checkpoints.candidates(folder):
        if newest is not None and path.name <= newest.name:
            break
        if checkpoints.unfinished(path):
            shutil.rmtree(path)
        else:
            log.warning("checkpoint %s is damaged and is set aside", path)
            path.rename(_free(path.with_suffix(".damaged")))
    for path in folder.glob("*snapshot*.json"):
        try:
            tree = _agreeing(json.loads(path.read_text()), folder)
        except (ValueError, KeyError, TypeError, AttributeError):
            tree = None  # Ray writes it in place: a kill may have torn it
        if tree is None:
            path.rename(_free(path.with_suffix(".torn")))
        else:
            partial = path.with_suffix(".partial")
            partial.write_text(json.dumps(tree))
            partial.replace(path)


def _agreeing(tree: dict[str, Any], folder: Path) -> dict[str, Any] | None:
    """Ray's list without missing or doubled checkpoints; None if none is left or Ray differs."""
    if tree["ray_version"] != ray.__version__:
        return None
    entries = zip(tree["checkpoint_results"], tree["checkpoint_report_indices"], strict=True)
    # the later of two
    kept = {entry["checkpoint_dir_name"]: (entry, index) for entry, index in entries}
    kept = {name: pair for name, pair in kept.items() if (folder / name).is_dir()}
    if not kept:
        return None
    for entry, _ in kept.values():
        entry["metrics"] = {
            key: WORST if value is None else value for key, value in entry["metrics"].items()
        }
    latest = tree["latest_checkpoint_result"]
    if latest is None or latest["checkpoint_dir_name"] not in kept:
        latest = max(kept.values(), key=lambda pair: pair[1])[0]
    named = [name for name in tree["validated_checkpoint_dir_names"] if name in kept]
    return tree | {
        "checkpoint_results": [entry for entry, _ in kept.values()],
        "checkpoint_report_indices": [index for _, index in kept.values()],
        "latest_checkpoint_result": latest,
        "pending_training_results": [],
        "pending_validation_specs": [],
        "validated_checkpoint_dir_names": named,
    }


def _free(path: Path) -> Path:
    """`path`, with a number behind it where an earlier start left that name."""
    number, free = 1, path
    while free.exists():
        free, number = path.with_name(f"{path.name}-{number}"), number + 1
    return free
