"""Imports run one way: jobs -> pipelines -> lidit, and each library has one place (design: the house)."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CLUSTER = {"ray", "deepspeed", "mlflow"}
SIBLINGS = {path.stem for path in (ROOT / "lidit").iterdir() if path.is_dir() or path.suffix == ".py"} - {"__init__"}
LEAVES = {
    "config": {"errors", "settings"},
    "settings": {"errors"},
    "errors": set(),
    "store": {"errors", "store"},
    "models": SIBLINGS - {"store", "data", "text", "evals"},
}


def imported(source: str) -> set[str]:
    """Every module a source file imports, at any depth of the code."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"relative import of {node.module}"
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return found


def violations(relative: Path, source: str) -> list[str]:
    names, package = imported(source), relative.parts[0]
    tops = {name.split(".")[0] for name in names}
    bad = []
    if package == "lidit":
        bad += sorted(tops & (CLUSTER | {"pipelines", "jobs"}))
        room = relative.parts[1].removesuffix(".py")
        if room in LEAVES:
            siblings = {name.split(".")[1] for name in names if name.startswith("lidit.")}
            bad += sorted(f"lidit.{name}" for name in (siblings & SIBLINGS) - LEAVES[room])
    if package == "pipelines":
        bad += sorted(tops & {"jobs"})
        if "mlflow" in tops and relative.name != "tracking.py":
            bad.append("mlflow outside tracking.py")
    if package == "jobs":
        bad += sorted(tops & CLUSTER)
    return [f"{relative}: {name}" for name in bad]


def test_imports_run_one_way() -> None:
    files = [p for package in ("lidit", "pipelines", "jobs") for p in (ROOT / package).rglob("*.py")]
    assert len(files) > 20
    assert [v for path in files for v in violations(path.relative_to(ROOT), path.read_text())] == []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("lidit/text/encoder.py", "def f():\n    import ray.data\n"),
        ("lidit/models/refiner.py", "from pipelines.fit import run\n"),
        ("lidit/store/corpus.py", "from lidit.text.specs import EncoderSpec\n"),
        ("lidit/models/lidit.py", "from lidit.store import Corpus\n"),
        ("pipelines/fit.py", "import mlflow\n"),
        ("jobs/train.py", "import deepspeed\n"),
    ],
)
def test_the_rule_sees_a_wrong_import(path: str, source: str) -> None:
    assert violations(Path(path), source)


def test_modules_stay_short() -> None:
    long = {}
    for package in ("lidit", "pipelines", "jobs"):
        for path in (ROOT / package).rglob("*.py"):
            if (count := len(path.read_text().splitlines())) > 400:
                long[str(path.relative_to(ROOT))] = count
    assert long == {}
