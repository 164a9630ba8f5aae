"""`lidit ui`: MLflow's pages over the runs of a folder."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from jobs.support.start import run
from lidit.errors import InputError


def command(
    folder: Annotated[
        Path, typer.Argument(help="OUTPUT of trainings, which holds mlflow.db.")
    ] = Path("runs"),
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port on this machine.")] = 5000,
    host: Annotated[
        str,
        typer.Option(help="Address to listen on; others than 127.0.0.1 are open to the network."),
    ] = ("127.0.0.1"),
) -> None:
    """Show the runs of a folder in MLflow: one process that serves pages, and none that runs jobs.

    **Reads** OUTPUT/mlflow.db and the files beside it. **Writes** what is edited on the pages. Ends
    with Ctrl-C.

    **Example:** `lidit ui demo/runs`
    """
    if not (folder / "mlflow.db").is_file():
        raise InputError(
            f"{folder}: no mlflow.db; give the OUTPUT of your trainings, or open your MLflow "
            "server's page"
        )
    # MLflow takes seconds to load: the folder is looked at before.
    from pipelines.tracking.runs import first_page
    from pipelines.tracking.store import local_store, server_environment

    words = [
        "server",
        "--backend-store-uri",
        local_store(folder),
        "--workers",
        "1",
        "--host",
        host,
        "--port",
        str(port),
    ]
    # The view for models, not for chats: MLflow remembers only what its switch was set to.
    print(f"http://{host}:{port}/{first_page(local_store(folder))}", flush=True)
    os.environ.update(server_environment())
    os.execv(sys.executable, [sys.executable, "-m", "mlflow", *words])


if __name__ == "__main__":
    run(command)
