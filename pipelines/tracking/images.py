"""Pictures of a step: MLflow shows those of one key with a slider."""

from __future__ import annotations

from pathlib import Path

from mlflow import MlflowClient
from PIL import Image

from pipelines.tracking.delivery import GoneError

FOLDER = "images"


def send_image(client: MlflowClient, run_id: str, path: Path, key: str, step: int) -> None:
    """Log one picture, unless the run has it: a delivery that is tried again must not show it
    twice.
    """
    if not path.exists():
        raise GoneError(f"{path} is no longer there")
    start = f"{FOLDER}/{key}+step+{step}+"
    sent = [
        each.path for each in client.list_artifacts(run_id, FOLDER) if each.path.startswith(start)
    ]
    if any(name.endswith(".webp") for name in sent):  # it goes last
        return
    with Image.open(path) as image:
        client.log_image(run_id, image.convert("RGB"), key=key, step=step)
