"""MLflow: one run per job, whatever the tracker's health."""

from pipelines.tracking.environment import prepare_environment

prepare_environment()

from pipelines.tracking.origin import PARENT
from pipelines.tracking.runs import RUN_FILE, RunHandle, check_experiment, curves, read_run_id
from pipelines.tracking.store import credentials, local_store, open_command, sign_in, store_uri
from pipelines.tracking.tracker import OUTBOX, Tracker, tracked_run

__all__ = [
    "OUTBOX",
    "PARENT",
    "RUN_FILE",
    "RunHandle",
    "Tracker",
    "check_experiment",
    "credentials",
    "curves",
    "local_store",
    "open_command",
    "read_run_id",
    "sign_in",
    "store_uri",
    "tracked_run",
]
