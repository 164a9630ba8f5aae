"""MLflow: one run per job, whatever the tracker's health."""

from pipelines.tracking.tracker import (
    OUTBOX,
    RunHandle,
    Tracker,
    credentials,
    curves,
    git_state,
    local_store,
    open_command,
    sign_in,
    store_uri,
    tracked_run,
)

__all__ = [
    "OUTBOX",
    "RunHandle",
    "Tracker",
    "credentials",
    "curves",
    "git_state",
    "local_store",
    "open_command",
    "sign_in",
    "store_uri",
    "tracked_run",
]
