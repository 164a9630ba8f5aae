"""What makes a tracked model folder an MLflow model: signature, example, requirements and the code
that draws.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import mlflow.pyfunc
from mlflow.models import Model

CODE = Path(__file__).with_name("served_model.py")
PINNED = ("torch", "diffusers", "transformers", "mlflow")
PARAMS = {"seed": 0, "steps": 0, "guidance_scale": -1.0}


def write_flavor(folder: Path, prompt: str) -> Path:
    """Write the files that go beside a model folder's own, so that `mlflow.pyfunc.load_model` draws
    with it.

    folder: made anew. prompt: the example. The weights are not copied: the model folder is the
    artifact itself.
    """
    shutil.rmtree(folder, ignore_errors=True)
    with tempfile.TemporaryDirectory() as place:
        made = Path(place, "flavor")
        # It would tell that the example was not drawn: the weights are elsewhere, and the types say
        # the signature.
        logging.getLogger("mlflow.models.signature").setLevel(logging.ERROR)
        mlflow.pyfunc.save_model(
            made,
            python_model=str(CODE),
            input_example=([prompt], PARAMS),
            pip_requirements=requirements(),
        )
        described = Model.load(str(made))
        described.flavors["python_function"]["artifacts"] = {"model": {"path": ".", "uri": "."}}
        described.save(str(made / "MLmodel"))
        shutil.copytree(made, folder)
    return folder


def requirements() -> list[str]:
    """This package and the libraries that decide what a picture looks like, as they are installed
    here.
    """
    found = []
    for name in ("lidit-pipeline", *PINNED):
        try:
            # builds of one version have other names
            found.append(f"{name}=={version(name).partition('+')[0]}")
        except PackageNotFoundError:
            continue
    return found
