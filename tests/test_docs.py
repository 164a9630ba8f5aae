"""The documentation is true: commands parse, recipes validate, messages exist, recipes for readers
run.
"""

import ast
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
import typer
import yaml

from jobs.main import app
from lidit.config import EncoderSettings, Recipe
from lidit.config.settings import apply_overrides, load_yaml, validate
from lidit.config.shipped import RECIPES, load_encoder_settings, load_recipe
from lidit.errors import InputError
from lidit.store import Corpus
from pipelines.serving.settings import ServeSettings
from tests.helpers.corpus_factory import make_corpus
from tests.helpers.embed_job import captions, embed_here, encoder
from tests.helpers.tiny_models import tiny_llm

ROOT = Path(__file__).parents[1]
USAGE_ERROR = typer.BadParameter.__mro__[1]
FRONT = ("README.md", "SECURITY.md", "CONTRIBUTING.md", "CHANGELOG.md")
PAGES = sorted([*(ROOT / "docs").glob("*.md"), *(ROOT / name for name in FRONT)])
FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"(?:^\s*(?:[A-Z_]+=\S+\s+)*lidit\s+|python -m jobs\.)(?P<words>[a-z].*)")
LINK = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")
# Written like paths, but a node's label, and a file that the reader makes.
NO_PATHS = {"lidit/pool", "infra/single-server/secrets/lidit.env"}


def links(page: Path) -> list[str]:
    return LINK.findall(page.read_text())


def blocks(page: Path, *languages: str) -> list[str]:
    return [body for language, body in FENCE.findall(page.read_text()) if language in languages]


def commands() -> list[tuple[str, str]]:
    """(page, words after `lidit`) of every command in a block, and of code spans that begin with
    `lidit `.
    """
    found = []
    for page in PAGES:
        lines = [
            line
            for block in blocks(page, "", "sh", "bash")
            for line in block.replace("\\\n", " ").splitlines()
        ]
        spans = re.findall(r"`(lidit [^`…]*?)`", FENCE.sub("", page.read_text()))
        for line in [*lines, *(span for span in spans if "=" in span or "--" in span)]:
            match = COMMAND.search(line.partition("  #")[0])
            if match and not line.lstrip().startswith("#"):
                found.append((page.name, match["words"]))
    return found


def parse(words: list[str]) -> dict[str, object]:
    """The arguments as the real command would get them; click's error where it would
    refuse them.
    """
    command = typer.main.get_command(app)
    sub, name, rest = command.commands[words[0]], words[0], words[1:]  # type: ignore[attr-defined]
    context = sub.make_context(name, list(rest))
    while hasattr(
        sub, "commands"
    ):  # a group, such as evaluate: the words that follow are its command's
        name, sub, rest = sub.resolve_command(context, [*context._protected_args, *context.args])
        context = sub.make_context(name, list(rest), parent=context)
    return dict(context.params)


def check_command(text: str) -> None:
    words = shlex.split(text)
    found = parse(words)
    if words[0] == "submit":
        rest = words[words.index(str(found["job"])) + 1 :]
        check_command(shlex.join([str(found["job"]), *rest]))
    elif words[0] in ("train", "run", "plan"):
        name, overrides = str(found["recipe"]), list(found["overrides"] or [])  # type: ignore[call-overload]
        if not name.endswith(".yaml"):
            load_recipe(name, overrides)
            return
        # any recipe of a reader's own must at least take the overrides
        tree = load_yaml(RECIPES / "demo.yaml")
        tree["encoders"] = [{"name": entry, "model": "x"} for entry in tree["encoders"]]
        tree["train"]["batch_size"] = 2048
        validate(Recipe, apply_overrides(tree, overrides), text)
    elif words[0] == "embed":
        if not found["encoder"] and not found["rolling"]:
            raise InputError("neither an LLM nor a recipe")
        for name in found["encoder"] or ():  # type: ignore[attr-defined]
            if not name.endswith(".yaml"):
                settings = [*(found["overrides"] or ()), *(found["setting"] or ())]  # type: ignore[misc]
                load_encoder_settings(name, settings)


def test_there_is_much_to_check() -> None:
    assert len(commands()) > 25
    assert {name for name, _ in commands()} >= {
        "README.md",
        "cluster.md",
        "scaling.md",
        "extending.md",
    }


@pytest.mark.parametrize(("page", "text"), commands())
def test_every_command_is_one_that_exists(page: str, text: str) -> None:
    check_command(text)


@pytest.mark.parametrize(
    "text", ["embd corpus", "embed corpus --encodr x", "embed corpus", "train demo train.step=3"]
)
def test_a_wrong_command_is_seen(text: str) -> None:
    with pytest.raises((USAGE_ERROR, KeyError, InputError)):
        check_command(text)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_settings_in_the_pages_are_valid(page: Path) -> None:
    demo = load_yaml(RECIPES / "demo.yaml")
    for block in blocks(page, "yaml"):
        tree = yaml.safe_load(block)
        if {"name", "model"} <= set(tree) and isinstance(tree["model"], str):
            validate(EncoderSettings, tree, page.name)
            continue
        if "guards" in tree:
            validate(ServeSettings, {"model": "x", **tree}, page.name)
            continue
        names = list(tree.get("pools", {})) or demo["encoders"]
        names = tree.pop("encoders", names)
        encoders = [{"name": one, "model": "x"} if isinstance(one, str) else one for one in names]
        validate(Recipe, {**demo, **tree, "encoders": encoders}, page.name)


def test_the_recipe_of_ones_own_data_names_what_its_page_embeds() -> None:
    """Followed from top to bottom, every family that the training reads has been computed."""
    page = ROOT / "docs" / "own-data.md"
    (written,) = blocks(page, "yaml")
    tree = yaml.safe_load(written)
    tree["encoders"] = [load_encoder_settings(name).model_dump() for name in tree["encoders"]]
    recipe = validate(Recipe, tree, page.name)
    embeds = [parse(shlex.split(text)) for name, text in commands() if name == page.name]
    embedded = [word for found in embeds for word in found.get("encoder") or ()]  # type: ignore
    assert [one.name for one in recipe.encoders] == embedded
    assert recipe.pool.gpus == 1, "the encoders' dtype is that of the page's --gpus 1"


def messages() -> list[str]:
    """What code can say: every string of the packages, with … for what is put in."""
    found = []
    for package in ("lidit", "pipelines", "jobs"):
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.JoinedStr):
                    parts = [
                        str(p.value) if isinstance(p, ast.Constant) else "…" for p in node.values
                    ]
                    found.append("".join(parts))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
    return found


def exists(message: str, said: list[str]) -> bool:
    """… in the page may stand for anything put in; the pieces around it must follow each other in
    one message.
    """
    pattern = re.compile(
        ".*".join(re.escape(piece.strip()) for piece in message.split("…")), re.DOTALL
    )
    return any(pattern.search(text.replace("%s", "…").replace("%d", "…")) for text in said)


def test_every_message_of_the_troubleshooting_page_exists() -> None:
    text = (ROOT / "docs" / "troubleshooting.md").read_text()
    told = [
        message
        for line in text.splitlines()
        if line.startswith("- `")
        for message in re.findall(r"`([^`]+)`", re.match(r"- (`[^`]+`(?: and `[^`]+`)*)", line)[1])  # type: ignore[index]
    ]
    said = messages()
    assert len(told) > 35
    assert [message for message in told if not exists(message, said)] == []
    assert not exists("this message is … nowhere", said)


def test_every_benchmark_of_the_page_takes_quick() -> None:
    page = (ROOT / "benchmarks" / "README.md").read_text()
    scripts = re.findall(r"^\| `python -m benchmarks\.(\w+)`", page, re.MULTILINE)
    assert len(scripts) > 6
    without = [
        name
        for name in scripts
        if '"--quick"' not in (ROOT / "benchmarks" / f"{name}.py").read_text()
    ]
    assert without == []


def test_files_the_pages_link_to_exist() -> None:
    for page in PAGES:
        for target in links(page):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def paths(text: str) -> set[str]:
    """Code spans that name a file or folder of this repository, with the test's name where there is
    one.
    """
    spans = re.findall(r"`([\w.-]+/[\w./*-]*(?:::\w+)?)`", FENCE.sub("", text))
    top = {path.name for path in ROOT.iterdir() if path.is_dir()}
    return {span for span in spans if span.partition("/")[0] in top} - NO_PATHS


def is_there(span: str) -> bool:
    path, _, test = span.partition("::")
    files = list(ROOT.glob(path.rstrip("/")))
    return bool(files) and (not test or f"def {test}(" in files[0].read_text())


@pytest.mark.parametrize(
    "page", [*PAGES, ROOT / "benchmarks" / "README.md"], ids=lambda page: page.name
)
def test_every_path_the_pages_name_exists(page: Path) -> None:
    assert [span for span in sorted(paths(page.read_text())) if not is_there(span)] == []


def test_a_path_that_is_not_there_is_seen() -> None:
    named = paths(
        "`lidit/fit.py`, `tests/test_docs.py::test_nothing`, `lidit/text/*.py`, `runs/x`, `a / b`"
    )
    assert {span for span in named if not is_there(span)} == {
        "lidit/fit.py",
        "tests/test_docs.py::test_nothing",
    }
    assert "lidit/text/*.py" in named


def test_the_tree_in_the_readme_is_the_tree() -> None:
    (tree,) = blocks(ROOT / "README.md", "text")
    top, named = "", {}
    for line in tree.splitlines():
        name = line.split()[0].rstrip("/")
        top = top if line.startswith("  ") else name
        named.setdefault(top, set()).update({name} - {top})
    assert all((ROOT / top / name).exists() for top, names in named.items() for name in names)
    for package in ("lidit", "pipelines"):
        assert {path.parent.name for path in (ROOT / package).glob("*/__init__.py")} <= named[
            package
        ]


def test_every_page_is_reached_from_the_readme() -> None:
    reached, waiting = set(), [ROOT / "README.md"]
    while waiting:
        page = waiting.pop().resolve()
        if page in reached or page.suffix != ".md":
            continue
        reached.add(page)
        waiting += [page.parent / target for target in links(page)]
    assert {page.resolve() for page in PAGES} <= reached


def test_what_the_steps_make_in_the_checkout_is_not_sent_to_a_cluster() -> None:
    """Ray leaves behind what .gitignore names; a corpus in the folder would be larger than it
    takes.
    """
    made = {"corpus", "exported", "pictures", "runs", "scenes", "tars"}
    for page in ("README.md", "docs/extending.md"):
        text = "\n".join(blocks(ROOT / page, ""))
        found = set(re.findall(r"--(?:out|corpus) ([a-z]+)(?=\s)", text))
        assert found <= made, f"{page}: {found - made}"
    ignored = (ROOT / ".gitignore").read_text().splitlines()
    assert {f"/{name}/" for name in made} <= set(ignored)
    assert not [name for name in made if (ROOT / name / "__init__.py").exists()]


def test_the_format_page_reads_a_corpus_without_our_code(tmp_path: Path) -> None:
    (code,) = blocks(ROOT / "docs" / "format.md", "python")
    assert "lidit" not in re.findall(r"^(?:import|from) (\w+)", code, re.MULTILINE)
    (tmp_path / "read.py").write_text(code)
    model = tiny_llm(tmp_path / "model", "llama")
    # large: named like one of more than 100,000 units
    usual, large = tmp_path / "corpus", tmp_path / "large"
    make_corpus(usual, captions(units=3, rows=5))
    make_corpus(large, captions(units=3, rows=5), digits=6)
    storages = ("int8", "bfloat16", "float32", "int4", "coded")
    for corpus, storage in (*((usual, storage) for storage in storages), (large, "int8")):
        settings = encoder(model, name=storage, storage=storage)
        embed_here(corpus, settings)
        done = subprocess.run(
            [sys.executable, "-I", "read.py", corpus, storage, "1"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        opened = Corpus.open(corpus)
        expected = opened.text_family(storage).read(1)
        with np.load(tmp_path / "states.npz") as stored:
            for row, states in enumerate(expected):
                # a matrix product adds up in another order
                close = 1e-5 if storage == "coded" else 1e-6
                np.testing.assert_allclose(
                    stored[f"arr_{row}"], states.float().numpy(), rtol=close, atol=close
                )
        assert all(caption in done.stdout for caption in opened.captions(1)["text"].to_pylist())


def test_python_in_the_extending_page_runs(tmp_path: Path) -> None:
    tiny_llm(tmp_path / "llama", "llama", layers=4)
    for code in blocks(ROOT / "docs" / "extending.md", "python"):
        done = subprocess.run(
            [sys.executable, "-c", code + "\nassert states.ndim == 2 and states.shape[1] == 64"],
            cwd=tmp_path, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr


def test_the_versions_of_the_format_page_are_the_codes() -> None:
    page = (ROOT / "docs" / "format.md").read_text()
    listed = re.findall(r"^\| [^|]+ \| `(\w+)` in `([\w/.]+)` \| (\d+) \|", page, re.MULTILINE)
    for name, file, number in listed:
        assert re.search(rf"^{name} = {number}\b", (ROOT / file).read_text(), re.MULTILINE), (
            file,
            name,
        )
    versions = [
        (found, str(path.relative_to(ROOT)))
        for path in (ROOT / "lidit").rglob("*.py")
        for found in re.findall(r"^(\w*VERSION) = ", path.read_text(), re.MULTILINE)
    ]
    assert sorted(versions) == sorted((name, file) for name, file, _ in listed)


def test_the_citation_names_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert (citation["version"], citation["license"]) == (project["version"], project["license"])
    # what the format asks for
    assert {"cff-version", "message", "title", "authors"} <= set(citation)


def test_the_hooks_before_a_commit_are_the_checks_of_make_lint() -> None:
    settings = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    hooks = [
        hook["entry"].removesuffix(" --force-exclude") for hook in settings["repos"][0]["hooks"]
    ]
    recipe = (ROOT / "Makefile").read_text().partition("\nlint:")[2].partition("\n\n")[0]
    linted = re.findall(r"\$\(BIN\)/(.*)", recipe)
    assert hooks == [f".venv/bin/{command.removesuffix(' .')}" for command in linted]
