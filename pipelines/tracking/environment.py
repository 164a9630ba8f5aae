"""Settings that MLflow reads from the environment, for whoever has not set them."""

import os


def prepare_environment() -> None:
    """Called before MLflow is imported: its telemetry starts, or does not, with the import."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "False")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    # A proxy in maintenance may ask for an hour's patience, in the thread that delivers everything
    # else.
    os.environ.setdefault("MLFLOW_HTTP_RESPECT_RETRY_AFTER_HEADER", "false")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")  # but a file's, see `patience`
