"""What `pip install` gives: a wheel with everything in it that commands need, and extras that
install.
"""

import json
import os
import shutil
import subprocess
import sys
import tomllib
import venv
from pathlib import Path
from zipfile import ZipFile

import pytest

from lidit.config.shipped import ENCODERS, RECIPES

ROOT = Path(__file__).parents[1]
# Extra -> a command that needs it, and what it says.
EXTRAS = {
    "cluster": (
        "import ray, deepspeed, mlflow, psutil, pipelines.training.train; print('cluster')",
        "cluster",
    ),
    "compiled": (
        "from lidit.store.coding.compiled import is_compiled; print(is_compiled())",
        "True",
    ),
    "lora": (
        "from lidit.config import ModelSettings; from lidit.config.align import LoraSettings; "
        "from lidit.models import LIDiT; from lidit.models.lora import add_lora; "
        "model = LIDiT.from_settings(ModelSettings(), {'llm': 8}, 4); "
        "add_lora(model, LoraSettings()); print(len(model.peft_config))",
        "1",
    ),
    "serve": ("import c2pa, pipelines.serving.api; print('serve')", "serve"),
    "gguf": (
        "import gguf, transformers; from lidit.text.packaged import MODELS; print(len(MODELS) > 0)",
        "True",
    ),
    "s3": (
        "from lidit.store.files.folder import open_url; "
        "print(type(open_url('s3://b/c')[0]).__name__)",
        "S3FileSystem",
    ),
    "server": ("import psycopg2, boto3, mlflow.server.auth; print('auth')", "auth"),
}


def run(*words: str | Path, cwd: Path, environment: dict[str, str] | None = None) -> str:
    done = subprocess.run(
        [str(word) for word in words], cwd=cwd, capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: a build leaves folders behind."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("lidit", "pipelines", "jobs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = (
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
        out,
        source,
    )
    run(sys.executable, *build, cwd=source)
    (built,) = out.glob("*.whl")
    return built


def test_the_wheel_holds_what_commands_read(wheel: Path, tmp_path: Path) -> None:
    with ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(tmp_path / "installed")
    assert {"lidit/py.typed", "pipelines/tracking/served_model.py"} <= names
    assert not [name for name in names if name.startswith(("tests", "benchmarks", "infra", "docs"))]
    # Away from the checkout, with this environment's libraries.
    python = (sys.executable, "-c")
    code = (
        "import sys; sys.path.insert(0, 'installed'); import jobs.main, lidit;"
        "sys.argv = ['lidit', 'recipes', 'list', '--json']; print(lidit.__file__); jobs.main.main()"
    )
    place, _, listed = run(*python, code, cwd=tmp_path).partition("\n")
    assert (
        place == str(tmp_path / "installed" / "lidit" / "__init__.py")
        or place == "installed/lidit/__init__.py"
    )
    expected = {path.stem for folder in (RECIPES, ENCODERS) for path in folder.glob("*.yaml")}
    assert {row["name"] for row in json.loads(listed)} == expected


def test_every_extra_is_tried() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = set(extras["optional-dependencies"])
    assert named - {"all", "dev"} == set(EXTRAS)
    (everything,) = extras["optional-dependencies"]["all"]
    assert set(everything.partition("[")[2].rstrip("]").split(",")) == set(EXTRAS) - {"server"}


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_an_empty_environment_installs_the_wheel_with_its_extras(
    wheel: Path, tmp_path: Path
) -> None:
    """Downloads the libraries from the package index, at the pinned versions: minutes."""
    venv.create(tmp_path / "env", with_pip=True)
    python, command = tmp_path / "env" / "bin" / "python", tmp_path / "env" / "bin" / "lidit"
    pip = (python, "-m", "pip", "install", "--quiet", "-c", ROOT / "constraints.txt")
    # deepspeed comes as source, and its build looks for torch; told so, it compiles nothing.
    run(*pip, "torch", "setuptools", "wheel", "ninja", "py-cpuinfo", cwd=tmp_path)
    environment = {**os.environ, "DS_BUILD_OPS": "0", "PYTHONPATH": ""}

    # The library alone: what needs no cluster works, and the rest names its extra in one line.
    run(*pip, wheel, cwd=tmp_path, environment=environment)
    assert run(command, "--version", cwd=tmp_path, environment=environment).startswith("lidit ")
    run(command, "doctor", cwd=tmp_path, environment=environment)
    (tmp_path / "captions.txt").write_text("a red circle\na blue square\n")
    ingest = (command, "ingest", "captions.txt", "--corpus", "corpus", "captions_only=true")
    assert "2 captions in 1 units" in run(*ingest, cwd=tmp_path, environment=environment)
    run(command, "scenes", "--out", "scenes", "--count", "4", cwd=tmp_path, environment=environment)
    pictures = (command, "ingest", "scenes", "--corpus", "pictures", "resolution=32")
    refused = subprocess.run(
        [*map(str, pictures)], cwd=tmp_path, capture_output=True, text=True, env=environment
    )
    assert refused.returncode == 2
    assert (
        refused.stderr == "error: this command needs ray: pip install 'lidit-pipeline[cluster]'\n"
    )

    # Each extra, by a command or a module of ours that needs it.
    everything = f"{wheel}[all,server]"
    run(*pip, "--no-build-isolation", everything, cwd=tmp_path, environment=environment)
    assert "4 samples" in run(*pictures, cwd=tmp_path, environment=environment)
    assert "demo" in run(command, "recipes", "list", cwd=tmp_path, environment=environment)
    cache = environment | {"LIDIT_CACHE": str(tmp_path / "cache")}
    embed = (command, "embed", "captions.txt", "--encoder", "smollm2", "--out", "states.parquet")
    assert "2 captions" in run(*embed, cwd=tmp_path, environment=cache)
    for code, expected in EXTRAS.values():
        assert (
            run(python, "-c", code, cwd=tmp_path, environment=environment).split()[-1] == expected
        )
