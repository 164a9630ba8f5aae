"""MLflow: one run per job, whatever the tracker's health."""

from pipelines.tracking.tracker import (
    SPOOL,
    RunHandle,
    Tracker,
    credentials,
    curves,
    git_state,
    local_store,
    open_command,
    store_uri,
    tracked_run,
)

__all__ = [
    "SPOOL",
    "RunHandle",
    "Tracker",
    "credentials",
    "curves",
    "git_state",
    "local_store",
    "open_command",
    "store_uri",
    "tracked_run",
]
