"""Pictures: of a step, shown by MLflow with a slider, and in a run's description."""

from __future__ import annotations

import re
from pathlib import Path

from mlflow import MlflowClient
from PIL import Image

from pipelines.tracking.delivery import GoneError
from pipelines.tracking.origin import DESCRIPTION

FOLDER = "images"


def send_image(client: MlflowClient, run_id: str, path: Path, key: str, step: int) -> None:
    """Log one picture, unless the run has it: a delivery that is tried again must not show it
    twice. The newest one of the key is also the file KEY.png, which the description shows.
    """
    if not path.exists():
        raise GoneError(f"{path} is no longer there")
    # MLflow's names: images/KEY+step+STEP+timestamp+...; the .webp of a picture goes last.
    named = re.compile(rf"{FOLDER}/{re.escape(key)}\+step\+(\d+)\+.*?(\.webp)?")
    sent = [named.fullmatch(each.path) for each in client.list_artifacts(run_id, FOLDER)]
    known = [(int(match[1]), match[2]) for match in sent if match]
    if (step, ".webp") in known:
        return
    with Image.open(path) as image:
        picture = image.convert("RGB")
    # One that a silent store did not take at its time comes after newer ones.
    if all(step >= other for other, _ in known):
        client.log_image(run_id, picture, artifact_file=f"{key}.png")
    # Once: whoever takes it out of the description wants it out.
    if not known:
        show_in_description(client, run_id, f"{key}.png")
    client.log_image(run_id, picture, key=key, step=step)


def show_in_description(client: MlflowClient, run_id: str, artifact: str) -> None:
    """Add a picture among the run's artifacts to its description, which people may have edited.

    MLflow's pages drop images with a data: address and keep relative ones, which lead to the
    server that shows the page.
    """
    description = client.get_run(run_id).data.tags.get(DESCRIPTION, "")
    picture = f"![{Path(artifact).stem}](get-artifact?path={artifact}&run_uuid={run_id})"
    if picture not in description:
        client.set_tag(run_id, DESCRIPTION, f"{description}\n\n{picture}".lstrip())
