"""`lidit serve`: a trained model behind a page and an API."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from jobs.support.start import run


def command(
    model: Annotated[
        Path | None, typer.Argument(help="Model folder written by `lidit train`.")
    ] = None,
    settings: Annotated[
        Path | None, typer.Option(help="File of settings (YAML); the options below go over it.")
    ] = None,
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Port; 8000 without it.")
    ] = None,
    host: Annotated[
        str | None, typer.Option(help="Address to listen at; this machine alone without it.")
    ] = None,
    folder: Annotated[
        Path | None, typer.Option(help="Keys, quotas and the audit log; ./serving without it.")
    ] = None,
    words: Annotated[
        Path | None, typer.Option(help="List of words that no prompt may hold, one a line.")
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="KEY=VALUE of the settings; any number.")
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(help="Write a Serve config for a cluster to this file, and start nothing."),
    ] = None,
) -> None:
    """Serve a model: a page to draw with, OpenAI's images API, and jobs, until Ctrl-C.

    **Reads** a model folder; loads its LLMs. **Writes** FOLDER/keys.sqlite, audit.jsonl,
    issued.sqlite; prints the page's address and, at the first start, a key. On this machine alone
    it may be started without guards; at any other address `guards` of prompts and pictures are
    needed, or `--set guards.needed=false`.

    **Example:** `lidit serve runs/demo/model --port 8000`
    """
    from lidit.config.settings import apply_overrides, load_yaml, validate
    from lidit.errors import InputError

    given = {"model": model, "port": port, "host": host, "folder": folder}
    tree = load_yaml(settings) if settings else {}
    tree |= {
        name: value if isinstance(value, int) else str(value)
        for name, value in given.items()
        if value is not None
    }
    if words is not None:
        tree["guards"] = {**(tree.get("guards") or {}), "words": str(words)}
    tree = apply_overrides(tree, list(set_ or []))
    if "model" not in tree:
        raise InputError(
            "lidit serve: give a model folder, as an argument or as `model` of the settings"
        )
    try:
        from pipelines.serving import starting
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] in ("lidit", "pipelines", "jobs"):
            raise
        raise InputError(
            f"lidit serve: {error.name} is not installed; pip install 'lidit-pipeline[serve]' "
            "brings it"
        ) from None
    from pipelines.serving.settings import ServeSettings

    chosen = starting.guarded(validate(ServeSettings, tree, str(settings or "lidit serve")), tree)
    if config is not None:
        starting.write_config(chosen, config)
        print(f"{config}: a Serve config; on the cluster: serve deploy {config}")
        return
    starting.serve_here(chosen)


if __name__ == "__main__":
    run(command)
