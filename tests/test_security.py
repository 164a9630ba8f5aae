"""Rules of SECURITY.md that source, recipes and lock file must keep; every rule is shown to fire on
a planted break.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from infra.audit import FLOORS, audit
from lidit.config.shipped import load_encoder_settings
from lidit.errors import InputError
from lidit.text import resolve_encoder

ROOT = Path(__file__).parents[1]
PACKAGES = ("lidit", "pipelines", "jobs", "benchmarks", "infra")
# What reads no weights, and our own loader, whose body is held to the rule.
NO_WEIGHTS = {"AutoConfig", "AutoTokenizer", "LIDiTPipeline"}
PICKLES = {
    "pickle",
    "cPickle",
    "_pickle",
    "dill",
    "joblib",
    "cloudpickle",
    "shelve",
    "marshal",
    "jsonpickle",
}
SAFE_LOADERS = {"yaml.SafeLoader", "yaml.CSafeLoader"}
FORBIDDEN_CALLS = {
    "eval": "runs text as code",
    "exec": "runs text as code",
    "__import__": "imports by a computed name",
    "os.system": "goes through a shell",
    "os.popen": "goes through a shell",
    "subprocess.getoutput": "goes through a shell",
    "subprocess.getstatusoutput": "goes through a shell",
    "yaml.unsafe_load": "builds any object",
    "yaml.unsafe_load_all": "builds any object",
    "yaml.full_load": "builds too many objects",
    "yaml.load_all": "use safe_load_all",
    "pandas.read_pickle": "unpickles",
    "torch.jit.load": "unpickles",
    "shutil.unpack_archive": "trusts member paths",
    "tempfile.mktemp": "is a race",
    "asyncio.create_subprocess_shell": "goes through a shell",
}
FORBIDDEN_TRUTHS = {"trust_remote_code", "shell", "allow_pickle"}
FORBIDDEN_FALSEHOODS = {"use_safetensors", "weights_only", "verify"}
UNSAFE_SWITCHES = {
    "RAY_DATA_AUTOLOAD_CLOUDPICKLE_TENSOR_METADATA",
    "RAY_DATA_AUTOLOAD_PICKLE_OBJECT_SCALAR",
    "RAY_DATA_WEBDATASET_ALLOW_UNSAFE_DESERIALIZATION",
}


def violations(source: str) -> list[str]:
    """`line: reason` for everything in a source file that could run foreign code or trust foreign
    data.
    """
    tree = ast.parse(source)
    names: dict[str, str] = {}
    found: list[tuple[int, str]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                names[alias.asname or alias.name.split(".")[0]] = (
                    alias.name if alias.asname else alias.name.split(".")[0]
                )
                if alias.name.split(".")[0] in PICKLES:
                    found.append((node.lineno, f"imports {alias.name}"))
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                names[alias.asname or alias.name] = f"{node.module}.{alias.name}"
            if node.module.split(".")[0] in PICKLES:
                found.append((node.lineno, f"imports {node.module}"))

    def dotted(node: ast.expr) -> str:
        if isinstance(node, ast.Name):
            return names.get(node.id, node.id)
        return f"{dotted(node.value)}.{node.attr}" if isinstance(node, ast.Attribute) else ""

    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            keywords = {keyword.arg: keyword.value for keyword in node.keywords if keyword.arg}
            found += [
                (node.lineno, reason) for reason in _call(dotted(node.func), node, keywords, dotted)
            ]
        elif isinstance(node, ast.Constant) and node.value in UNSAFE_SWITCHES:
            found.append((node.lineno, f"names {node.value}"))
        elif isinstance(node, ast.Assign) and _is(node.value, None):
            attributes = [
                target.attr for target in node.targets if isinstance(target, ast.Attribute)
            ]
            found += [
                (node.lineno, "takes away Pillow's pixel limit")
                for name in attributes
                if name == "MAX_IMAGE_PIXELS"
            ]
    return [f"{line}: {reason}" for line, reason in sorted(found)]


def _is(node: ast.expr | None, value: object) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


def _call(name: str, node: ast.Call, keywords: dict[str, ast.expr], dotted: Any) -> list[str]:
    reasons = []
    if name in FORBIDDEN_CALLS:
        reasons.append(f"{name} {FORBIDDEN_CALLS[name]}")
    if name == "torch.load" and not _is(keywords.get("weights_only"), True):
        reasons.append("torch.load without weights_only=True")
    if name == "yaml.load" and dotted(keywords.get("Loader", ast.Name(""))) not in SAFE_LOADERS:
        reasons.append("yaml.load without a safe loader")
    reasons += [
        f"{key} is not False"
        for key in FORBIDDEN_TRUTHS & set(keywords)
        if not _is(keywords[key], False)
    ]
    reasons += [
        f"{key}=False" for key in FORBIDDEN_FALSEHOODS & set(keywords) if _is(keywords[key], False)
    ]
    owner, _, last = name.rpartition(".")
    if (
        last == "from_pretrained"
        and owner.rpartition(".")[2] not in NO_WEIGHTS
        and not _is(keywords.get("use_safetensors"), True)
    ):
        reasons.append("from_pretrained without use_safetensors=True, so a pickle would do")
    if last == "extractall" and not (
        isinstance(keywords.get("filter"), ast.Constant) and keywords["filter"].value == "data"
    ):
        reasons.append("extractall without filter='data'")
    first = node.args[0] if node.args else None
    if (
        last == "from_pretrained"
        and isinstance(first, ast.Constant)
        and "/" in str(first.value)
        and "revision" not in keywords
    ):
        reasons.append(f"hub id {first.value!r} without a revision")
    return reasons


def sources() -> list[Path]:
    return sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def test_our_source_keeps_every_rule() -> None:
    assert len(sources()) > 20
    found = {}
    for path in sources():
        if broken := violations(path.read_text()):
            found[path.relative_to(ROOT).as_posix()] = broken
    assert found == {}


# What the check above must find, as text that is parsed and never run.
PLANTED = [
    ("import pickle", "imports pickle"),
    ("import joblib as j", "imports joblib"),
    ("from dill import loads", "imports dill"),
    ("import torch\ntorch.load('a')", "torch.load without"),
    # never run
    ("from torch import load as anything\nanything('a', weights_only=False)", "torch.load without"),
    ("import torch as t\nt.load('a', weights_only=flag)", "torch.load without"),
    ("AutoModel.from_pretrained(folder, trust_remote_code=True)", "trust_remote_code"),  # never run
    ("AutoModel.from_pretrained(folder, trust_remote_code=setting)", "trust_remote_code"),
    ("AutoModel.from_pretrained('meta/llama')", "without a revision"),
    ("AutoModel.from_pretrained(folder, use_safetensors=False)", "use_safetensors=False"),
    ("AutoModel.from_pretrained(folder)", "from_pretrained without use_safetensors"),
    (
        "LIDiT.from_pretrained(folder, use_safetensors=flag)",
        "from_pretrained without use_safetensors",
    ),
    (
        "class P(Q):\n def f(self):\n  super().from_pretrained(folder)",
        "from_pretrained without use_safetensors",
    ),
    ("getattr(diffusers, name).from_pretrained(folder)", "from_pretrained without use_safetensors"),
    ("import numpy as np\nnp.load('a', allow_pickle=True)", "allow_pickle"),
    ("import yaml\nyaml.load(text)", "safe loader"),
    ("import yaml\nyaml.load(text, Loader=yaml.FullLoader)", "safe loader"),
    ("from yaml import unsafe_load\nunsafe_load(text)", "builds any object"),
    ("import subprocess\nsubprocess.run(words, shell=True)", "shell"),
    ("import os\nos.system('ls')", "through a shell"),
    ("eval('1')", "runs text"),
    ("exec(code)", "runs text"),
    ("import tarfile\ntarfile.open('a').extractall('b')", "extractall"),
    ("import requests\nrequests.get(url, verify=False)", "verify=False"),
    ("from PIL import Image\nImage.MAX_IMAGE_PIXELS = None", "pixel limit"),
    ("os.environ['RAY_DATA_AUTOLOAD_PICKLE_OBJECT_SCALAR'] = '1'", "names RAY_DATA"),
]


@pytest.mark.parametrize(
    ("source", "reason"), PLANTED, ids=[source.splitlines()[-1] for source, _ in PLANTED]
)
def test_every_rule_fires_on_a_planted_violation(source: str, reason: str) -> None:
    assert any(reason in found for found in violations(source))


def test_what_is_allowed_stays_allowed() -> None:
    fine = """
import torch, yaml, subprocess, tarfile
torch.load("a", weights_only=True)
yaml.safe_load("a")
yaml.load("a", Loader=yaml.CSafeLoader)
subprocess.run(["ls"], shell=False)
AutoModel.from_pretrained(folder, trust_remote_code=False, use_safetensors=True)
AutoModel.from_pretrained("meta/llama", revision=commit, use_safetensors=True)
AutoTokenizer.from_pretrained(folder)
model.eval()
"""
    assert violations(fine) == []


# --- recipes --------------------------------------------------------------------------------------


def unpinned(tree: Any) -> list[str]:
    """Hub ids (`owner/name`, no folder, no package:) without a 40-hex revision beside them."""
    if isinstance(tree, list):
        return [found for item in tree for found in unpinned(item)]
    if not isinstance(tree, dict):
        return []
    found = [found for value in tree.values() for found in unpinned(value)]
    model = tree.get("model")
    is_hub_id = isinstance(model, str) and re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", model)
    if is_hub_id and not re.fullmatch(r"[0-9a-f]{40}", str(tree.get("revision", ""))):
        found.append(model)
    return found


def test_recipes_pin_every_hub_model_to_a_commit() -> None:
    recipes = sorted((ROOT / "jobs" / "recipes").rglob("*.yaml"))
    assert recipes
    loose = [path for path in recipes if unpinned(yaml.safe_load(path.read_text()))]
    # A preset of a public system leaves the commit to its user, and nothing is fetched without one.
    assert {path.parent.name for path in loose} <= {"encoders"}
    for path in loose:
        with pytest.raises(InputError, match="set `revision:` to the commit"):
            resolve_encoder(load_encoder_settings(path.stem), "cpu")


def test_an_unpinned_model_is_found() -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    assert unpinned({"encoders": [{"name": "a", "model": "google/gemma"}]}) == ["google/gemma"]
    assert unpinned({"encoders": [{"model": "google/gemma", "revision": "main"}]}) == [
        "google/gemma"
    ]
    assert unpinned({"encoders": [{"model": "google/gemma", "revision": commit}]}) == []
    assert (
        unpinned(
            {"model": {"width": 1}, "codec": {"model": "./folder/x"}, "e": {"model": "package:a"}}
        )
        == []
    )


# --- secrets in the repository --------------------------------------------------------------------

SECRETS = re.compile(
    r"AKIA[0-9A-Z]{16}|gh[pousr]_[A-Za-z0-9]{36}|hf_[A-Za-z0-9]{34}"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY|xox[bp]-[0-9A-Za-z-]{20}"
)


def test_no_secret_is_in_a_tracked_file() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode:
        pytest.skip("not a git checkout: which files are tracked is unknown")
    found = []
    for name in filter(None, listed.stdout.split("\0")):
        path = ROOT / name
        if path.is_file() and SECRETS.search(path.read_text("utf-8", "replace")):
            found.append(name)
    assert found == []


def test_planted_secrets_are_found() -> None:
    for planted in (
        "AKIA" + "A" * 16,
        "ghp_" + "a" * 36,
        "hf_" + "b" * 34,
        "-----BEGIN RSA " + "PRIVATE KEY-----",
    ):
        assert SECRETS.search(f"key = '{planted}'")


# --- the lock file --------------------------------------------------------------------------------

LOCK = (ROOT / "constraints.txt").read_text()


def test_the_lock_file_has_no_finding() -> None:
    assert audit(LOCK) == []
    assert (
        subprocess.run(
            [sys.executable, str(ROOT / "infra" / "audit.py")], check=False, env={}
        ).returncode
        == 0
    )


@pytest.mark.parametrize("package", FLOORS)
def test_a_version_below_a_floor_is_found(package: str) -> None:
    lowered = re.sub(rf"^{package}==.*$", f"{package}==1.0", LOCK, flags=re.MULTILINE)
    assert lowered != LOCK
    (finding,) = audit(lowered)
    assert finding.startswith(f"{package} 1.0 is below {FLOORS[package][0]}")
    (missing,) = audit(re.sub(rf"^{package}==.*$", "", LOCK, flags=re.MULTILINE))
    assert "not in the lock file" in missing


@pytest.mark.parametrize(
    "line", ["somepackage>=1", "somepackage", "somepackage @ https://example.com/a.whl", "a==1.*"]
)
def test_a_line_that_pins_nothing_is_found(line: str) -> None:
    assert len(audit(f"{LOCK}\n{line}\n")) == 1


def test_security_page_names_every_floor_and_only_tests_that_exist() -> None:
    page = (ROOT / "SECURITY.md").read_text()
    for package, (floor, _) in FLOORS.items():
        assert re.search(rf"\| {package} \| {re.escape(floor)} ", page)
    for file, name in re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", page):
        assert (ROOT / file).is_file(), file
        if name:
            assert f"def {name}(" in (ROOT / file).read_text(), f"{file}::{name}"
