"""The command before it works: fast, in panels, quiet when asked, and completed by shells."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jobs.keys import SCOPES
from jobs.main import overview
from jobs.recipe import KINDS
from jobs.support.run_folders import require_model
from jobs.support.start import guarded
from lidit.config.shipped import ENCODERS, SETTINGS, load_encoder_settings
from lidit.errors import InputError
from lidit.serving import keys
from tests.helpers.command import lidit

# All that the help and a wrong word may load besides the standard library: torch and its like take
# seconds.
MAY_BE_LOADED = {
    "_distutils_hack",
    "_virtualenv",
    "annotated_doc",
    "annotated_types",  # pydantic's; typer asks it for the types it knows
    "attr",
    "click",
    "jobs",
    "lidit",
    "markdown_it",
    "mdurl",
    "pipelines",
    "pydantic",
    "pydantic_core",
    "pygments",
    "rich",
    "shellingham",
    "typer",
    "typing_extensions",
    "typing_inspection",
}
# Which import no library.
OURS = {"lidit", "lidit.errors"}
ROOT = Path(__file__).parents[2]


def loaded_by(*words: str) -> set[str]:
    """Packages that a process of its own has loaded when the command with these words ends."""
    code = (
        "import sys, contextlib, io\n"
        "import jobs.main as command\n"
        "with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):\n"
        "    command.main()\n"
        "names = {name if name.startswith('lidit.') else name.partition('.')[0] for name in "
        "sys.modules}\n"
        "print('\\n'.join(sorted(names - set(sys.stdlib_module_names) - {'__main__', "
        "'sitecustomize'})))\n"
    )
    found = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, check=True, cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    return {
        name
        for name in found.stdout.split()
        if not name.startswith(("__editable__", "_sysconfigdata"))
    }


@pytest.mark.parametrize(
    "words",
    [
        ("--help",),
        ("embed", "--help"),
        ("evaluate", "m", "--per-tag", "3"),
        ("trian",),
        ("inspect", "docs"),
        ("ui", "/nowhere"),
        ("train", "--steps", "100", "demo"),
        ("sample", "docs", "--prompt", "a cat", "--out", "pictures"),
    ],
)
def test_help_and_wrong_words_load_no_library(words: tuple[str, ...]) -> None:
    assert loaded_by(*words) - MAY_BE_LOADED - OURS == set()


def test_commands_stand_in_panels(capsys: pytest.CaptureFixture[str]) -> None:
    assert lidit("--help") == 0
    text = capsys.readouterr().out
    places = [text.index(f"─ {panel} ─") for panel in ("Data", "Train", "Check", "Cluster")]
    assert places == sorted(places)
    assert places[0] < text.index("│ embed") < places[1] < text.index("│ train ") < places[2]
    assert "─ Commands ─" not in text, "a command without a panel"


def test_the_list_of_commands_is_that_of_the_whole_command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["lidit", "--help"])
    guarded(overview())
    listed = capsys.readouterr().out
    assert lidit("--help") == 0
    assert capsys.readouterr().out == listed


def test_names_in_the_help_are_those_there_are() -> None:
    assert ", ".join(SETTINGS) == KINDS
    assert ", ".join(keys.SCOPES) == SCOPES


def test_a_shell_completes_commands() -> None:
    asked = {"_LIDIT_COMPLETE": "complete_bash", "COMP_WORDS": "lidit emb", "COMP_CWORD": "1"}
    command, environment = (
        Path(sys.executable).with_name("lidit"),
        {**os.environ, "PYTHONPATH": str(ROOT), **asked},
    )
    found = subprocess.run(
        [str(command)], capture_output=True, text=True, cwd=ROOT, env=environment, check=False
    )
    assert found.stdout.split() == ["embed"], found.stderr


def test_no_color_and_quiet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert lidit("--help") == 0
    assert "\x1b[" in capsys.readouterr().out
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.delenv("FORCE_COLOR")
    assert lidit("--help") == 0
    assert "\x1b[3" not in capsys.readouterr().out
    monkeypatch.setenv("LIDIT_QUIET", "")
    assert lidit("scenes", "--out", tmp_path / "told", "--count", "4") == 0
    told = capsys.readouterr()
    assert "scenes: 4/4" in told.err
    assert lidit("-q", "scenes", "--out", tmp_path / "quiet", "--count", "4") == 0
    quiet = capsys.readouterr()
    assert quiet.err == ""
    assert quiet.out.replace("/quiet:", "/told:") == told.out


def test_settings_stand_among_the_sources(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "captions.txt").write_text("a red circle\na blue square\n")
    words = ("ingest", tmp_path / "captions.txt", "captions_only=true")
    assert lidit(*words, "--out", tmp_path / "one", "unit_samples=none") == 2
    assert "unit_samples" in capsys.readouterr().err
    assert lidit("ingest", "captions_only=true", "--corpus", tmp_path / "none") == 2
    assert "give a folder, a file or an address" in capsys.readouterr().err
    assert lidit(*words, "--corpus", tmp_path / "c", "--set", "captions=1") == 2
    assert "captions" in capsys.readouterr().err


def test_runs_of_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, steps, finished in (("done", 8, 8), ("half", 8, None)):
        folder = tmp_path / "runs" / name
        (folder / "step-000000004").mkdir(parents=True)
        (folder / "step-000000004" / "position.json").write_text("{}")
        (folder / "step-000000004" / "rank-00000.json").write_text("{}")
        (folder / "step-000000008").mkdir()  # being written when the run died
        recipe = {
            "name": name,
            "train": {"steps": steps},
            "encoders": [],
            "tracking": {"uri": None},
        }
        (folder / "recipe.json").write_text(json.dumps(recipe))
        (folder / "run.json").write_text("{}")
        tracked = tmp_path / "runs" / "artifacts" / name  # as MLflow copies a run's files
        tracked.mkdir(parents=True)
        (tracked / "recipe.json").write_text(json.dumps(recipe))
        if finished:
            (folder / "model").mkdir()
            (folder / "model" / "finished.json").write_text(json.dumps({"step": finished}))
    (tmp_path / "runs" / "torn").mkdir()
    (tmp_path / "runs" / "torn" / "recipe.json").write_text("{")
    (tmp_path / "runs" / "torn" / "run.json").write_text("{}")
    assert lidit("runs", tmp_path, "--json") == 0
    done, half = json.loads(capsys.readouterr().out)
    assert (done["name"], done["state"], done["step"]) == ("done", "finished", 8)
    assert (half["state"], half["step"], half["checkpoint"]) == (
        "stopped", 4, str(tmp_path / "runs/half/step-000000004"),
    )  # fmt: skip
    assert half["resume"] == f"lidit train {tmp_path}/runs/half/recipe.json"
    assert lidit("runs", tmp_path) == 0
    assert capsys.readouterr().out.splitlines()[1].startswith("half  stopped   step 4 of 8")
    assert lidit("status", tmp_path / "runs" / "half") == 0
    assert f"resume     lidit train {tmp_path}/runs/half/recipe.json" in capsys.readouterr().out
    # An alignment's recipe is made of another file: the path would not be taken.
    aligned = json.loads((tmp_path / "runs/half/recipe.json").read_text()) | {"align": {}}
    (tmp_path / "runs/half/recipe.json").write_text(json.dumps(aligned))
    assert lidit("status", tmp_path / "runs" / "half") == 0
    assert "resume     the same lidit align command as before" in capsys.readouterr().out
    assert lidit("status", tmp_path / "runs") == 2
    assert "no run here; there are" in capsys.readouterr().err


def test_a_doctor_names_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("LIDIT_CACHE", str(tmp_path))
    assert lidit("doctor", "--no-ray", "--json", "--place", tmp_path) == 1
    captured = capsys.readouterr()
    found = {one["what"]: one for one in json.loads(captured.out)}
    assert list(found) == [
        "python",
        "libraries",
        "gpus",
        "shared memory",
        "disk",
        "mlflow",
        "encoders",
        "store",
    ]
    assert found["mlflow"]["state"] == "bad"
    assert "http://127.0.0.1:9 does not answer" in found["mlflow"]["found"]
    told = found["encoders"]["remedy"]
    fetched, unpinned = told.split("; ")
    assert "smollm2" in fetched
    assert "qwen-image" not in fetched
    settings = [load_encoder_settings(path.stem) for path in ENCODERS.glob("*.yaml")]
    count = sum(one.revision is None and "package:" not in one.model for one in settings)
    assert unpinned == f"{count} others need a commit or folder: lidit encoders"
    assert found["store"]["state"] == "ok"
    assert "failed: lidit doctor: mlflow: see above" in captured.err
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert lidit("doctor", "--no-ray") == 0


def test_the_pages_of_a_folder_without_runs_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert lidit("ui", tmp_path) == 2
    assert f"{tmp_path}: no mlflow.db; give the OUTPUT of your trainings" in capsys.readouterr().err


def test_a_run_folder_in_a_models_place_names_the_model_in_it(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model_index.json").write_text("{}")
    with pytest.raises(InputError, match=f"give {tmp_path / 'model'}$"):
        require_model(tmp_path)
    require_model(tmp_path / "model")
