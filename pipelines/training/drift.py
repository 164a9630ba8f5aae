"""Whether a run goes on with the settings and the data that it was started with."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lidit.config import RunRecipe
from lidit.errors import InputError, one_line
from lidit.store import spec_differences

FACTS = "run.json"
# Settings that decide where and how fast a run goes, never what it computes.
FREE_ENGINE = {"workers", "min_workers", "cpus_per_worker", "gpus_per_worker", "max_failures",
               "resources",
               "label_selector", "zero_stage", "offload_optimizer", "offload_parameters",
               "nvme_path"}  # fmt: skip
# In the facts since runs have them, and as free: they decide how fast a run goes, not what it
# computes.
FREED = (("engine", "compile"), ("model", "activation_checkpointing"))


def settings_facts(recipe: RunRecipe, free: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe as a run's facts hold it: without its `free` settings, and for old settings as it
    always was.
    """
    config = recipe.model_dump(mode="json", exclude=free)
    config["engine"]["compile"] = bool(config["engine"]["compile"])
    # Newer than runs that go on, which have no such fact.
    if "data" in config and config["data"].get("sort_by_unit", True) is None:
        del config["data"]["sort_by_unit"]
    return config


def check_drift(folder: Path, facts: dict[str, Any], allow_drift: bool) -> None:
    """Raise InputError naming what differs if the run was started with other facts."""
    path = folder / FACTS
    if not path.exists():
        return
    try:
        started_with = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(
            f"{path}: cannot be read ({one_line(error, 120)}); delete it if the run's settings "
            "and data are "
            "still those it was started with, or give the run another name (name=...)"
        ) from None
    differences = spec_differences(_without_freed(started_with), _without_freed(facts))
    if differences and not allow_drift:
        listed = "\n  ".join(differences)
        raise InputError(
            f"{folder}: this run was started with other settings or data:\n  {listed}\n"
            "give the run another name (name=...), or continue it all the same with --allow-drift"
        )


def _without_freed(facts: Any) -> Any:
    """Facts without the settings of `FREED`."""
    facts = copy.deepcopy(facts)
    for section, key in FREED:
        settings = facts.get("config") if isinstance(facts, dict) else None
        held = settings.get(section) if isinstance(settings, dict) else None
        if isinstance(held, dict):
            held.pop(key, None)
    return facts
