"""Imports run one way: jobs -> pipelines -> lidit, floor by floor, and each big library has one
place.
"""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("lidit", "pipelines", "jobs")
# A room imports rooms of lower floors only, and itself.
LIBRARY = (
    {"errors", "progress", "commit"},
    {"pixels", "plots", "grids", "hub"},
    {"config", "store", "datasets"},
    {"images", "text", "models"},
    {"sources", "codecs", "diffusion"},
    {"data", "pipeline"},
    {"evals", "plan", "serving"},
)
CLUSTER = (
    {"runtime", "tracking"},
    {"corpus", "evaluation"},
    {"training", "serving"},
    {"chain"},
    {"ablation"},
)
APART = {"submission"}  # beside the floors: it needs no other wing, and none needs it
# Rooms that keep to fewer than their floor allows.
NARROW = {
    "store": {"errors", "pixels", "progress", "plots"},
    "models": {"config", "errors"},
    "config": {"errors"},
}
ONLY_IN = {
    "ray": ("pipelines/",),
    "deepspeed": tuple(
        f"pipelines/training/{name}.py" for name in ("ema", "engine", "gradients", "partition")
    ),
    "mlflow": ("pipelines/tracking/",),
}


def floor_of(room: str, floors: tuple[set[str], ...]) -> int:
    return next(number for number, rooms in enumerate(floors) if room in rooms)


def imports(tree: ast.AST) -> list[tuple[str, bool]]:
    """(module, whether inside a function or a TYPE_CHECKING block) of every import, at any depth of
    the code.
    """
    found: list[tuple[str, bool]] = []

    def visit(node: ast.AST, inside: bool) -> None:
        if isinstance(node, ast.Import):
            found.extend((alias.name, inside) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import of {node.module}"
            found.append((node.module or "", inside))
            found.extend((f"{node.module}.{alias.name}", inside) for alias in node.names)
        hidden = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) or (
            isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        )
        for child in ast.iter_child_nodes(node):
            visit(child, inside or hidden)

    visit(tree, False)
    return found


def forbidden(package: str, room: str, name: str) -> str | None:
    """Why a file of `package`/`room` may not import module `name` of ours; None where it may."""
    target, _, rest = name.partition(".")
    other = rest.partition(".")[0]
    if target == "jobs" and package != "jobs":
        return "nobody imports jobs"
    if target == "pipelines" and package == "lidit":
        return "the library never imports pipelines"
    if target != package or package == "jobs" or not other or other == room:
        return None
    floors = LIBRARY if package == "lidit" else CLUSTER
    rooms = set.union(*floors) | (APART if package == "pipelines" else set())
    if other not in rooms:
        return None  # a name of the package itself, such as lidit.__version__
    if room in APART or other in APART:
        return "stands apart"
    if room in NARROW and other not in NARROW[room]:
        return f"{room} imports only {', '.join(sorted(NARROW[room]))}"
    if floor_of(other, floors) >= floor_of(room, floors):
        return f"{other} is on no lower floor than {room}"
    return None


def violations(relative: Path, source: str) -> list[str]:
    package, room = relative.parts[0], relative.parts[1].removesuffix(".py")
    face = relative.parts[1] == "__init__.py"  # the front door opens every room
    bad = []
    for name, inside in imports(ast.parse(source)):
        for library, places in ONLY_IN.items():
            if name.split(".")[0] == library and not str(relative).startswith(places):
                bad.append(f"{name}: {library} has its place in {' and '.join(places)}")
        ours = name.split(".")[0] in PACKAGES
        if inside and ours and package != "jobs" and not face:
            bad.append(f"{name}: imported inside a function or under TYPE_CHECKING")
        if not face and (why := forbidden(package, room, name)):
            bad.append(f"{name}: {why}")
    return [f"{relative}: {line}" for line in sorted(set(bad))]


def test_imports_run_one_way() -> None:
    files = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    assert len(files) > 150
    assert [v for path in files for v in violations(path.relative_to(ROOT), path.read_text())] == []


def test_every_room_has_its_floor() -> None:
    for package, floors, apart in (("lidit", LIBRARY, set()), ("pipelines", CLUSTER, APART)):
        found = {
            path.stem
            for path in (ROOT / package).iterdir()
            if path.is_dir() or path.suffix == ".py"
        }
        assert found - {"__init__", "__pycache__", "py"} <= set.union(*floors) | apart


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("lidit/text/encoder.py", "def f():\n    import ray.data\n"),
        ("lidit/models/refiner.py", "from pipelines.training.train import train\n"),
        ("lidit/store/corpus.py", "from lidit.text.specs import EncoderSpec\n"),
        ("lidit/store/corpus.py", "def f():\n    from lidit.store.families import TextFamily\n"),
        ("lidit/images/decode.py", "from lidit.sources import base\n"),
        ("lidit/models/lidit.py", "from lidit.store import Corpus\n"),
        ("lidit/diffusion/samplers.py", "from lidit import evals\n"),
        (
            "lidit/plan/facts.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import lidit.evals\n",
        ),
        ("lidit/plan/facts.py", "from jobs.train import command\n"),
        ("pipelines/training/train.py", "import mlflow\n"),
        ("pipelines/training/record.py", "from mlflow import MlflowClient\n"),
        ("pipelines/corpus/embed.py", "import deepspeed\n"),
        ("pipelines/runtime/progress.py", "from pipelines.corpus import embed\n"),
        ("pipelines/submission/submit.py", "from pipelines.runtime import resources\n"),
        ("jobs/train.py", "import deepspeed\n"),
    ],
)
def test_the_rule_sees_a_wrong_import(path: str, source: str) -> None:
    assert violations(Path(path), source)


def test_modules_stay_short() -> None:
    long = {}
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            if (count := len(path.read_text().splitlines())) > 400:  # of at most 100 characters
                long[str(path.relative_to(ROOT))] = count
    assert long == {}


# More parameters than six, and why.
WIDE = {
    "lidit/data/feed.py:open_feed": "the front door's options, all but the corpus by name",
    "lidit/datasets/scenes/benchmark.py:_new_prompt": "a rejection loop's fixed part, drawn often",
    "lidit/datasets/scenes/layouts.py:_free_spot": "a rejection loop's fixed part, drawn often",
    "lidit/models/conditioner.py:__init__": "diffusers saves a model's configuration as flat "
    "arguments",
    "lidit/models/lidit.py:__init__": "diffusers saves a model's configuration as flat arguments",
    "lidit/pipeline/pipeline.py:__call__": "a diffusers pipeline's call",
    "lidit/pipeline/pipeline.py:from_pretrained": "a diffusers pipeline's loading",
    "lidit/sources/webdataset_tar.py:_take": "one member, its group and the source they belong to",
    "lidit/store/corpus.py:publish_corpus": "what a corpus is made of, written once",
    "pipelines/tracking/tracker.py:tracked_run": "what identifies a run and what it holds, in "
    "MLflow's "
    "words",
}


def test_functions_take_six_parameters_or_have_a_reason() -> None:
    wide = set()
    for package in ("lidit", "pipelines"):
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                    named = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                    if len([a for a in named if a.arg not in ("self", "cls")]) > 6:
                        wide.add(f"{path.relative_to(ROOT)}:{node.name}")
    assert wide == set(WIDE)
    assert len(WIDE) <= 10
