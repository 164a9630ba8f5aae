"""`lidit encoders`: the prompt encoders that ship, and what a token of each costs."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jobs.support.start import run

if TYPE_CHECKING:
    from lidit.config import EncoderSettings

# compute: as on a GPU; coded: about, at an error of .1
BYTES = {"compute": 2, "bfloat16": 2, "float32": 4, "int8": 1, "int4": 0.53125, "coded": 0.4}


def command(
    as_json: Annotated[bool, typer.Option("--json", help="As JSON instead.")] = False,
) -> None:
    """List the encoders that ship: system, model, layers, width and bytes of a stored token, the
    weights' licence.

    **Reads** the shipped encoder files. **Writes** nothing; loads no model. A model on a hub needs
    the commit that you reviewed, and any of them can be a folder: `revision=...`,
    `model=./folder`.

    **Example:** `lidit embed corpus --encoder qwen-image model=./Qwen2.5-VL-7B-Instruct`
    """
    from lidit.config.left_out import LEFT_OUT
    from lidit.config.shipped import ENCODERS, load_encoder_settings

    found = [
        row(path.stem, load_encoder_settings(path.stem)) for path in sorted(ENCODERS.glob("*.yaml"))
    ]
    if as_json:
        print(json.dumps(found, indent=1))
        return
    print(
        f"{'name':21} {'system':19} {'width':>7} {'bytes':>7}  {'layers':16} {'model':45} licence"
    )
    for line in found:
        layers = ",".join(map(str, line["layers"]))
        layers = layers if len(layers) <= 16 else f"{len(line['layers'])} of {line['blocks']}"
        print(
            f"{line['name']:21} {line['system']:19} {line['width']:7} {line['bytes']:7}  "
            f"{layers:16} {line['model']:45} {line['licence']}"
        )
    print(f"\nleft out, with the reason when asked for: {', '.join(LEFT_OUT)}")


def row(name: str, settings: EncoderSettings) -> dict[str, Any]:
    """One encoder: `name` is what `--encoder` takes; `width` and `bytes` are of a stored token."""
    from lidit.text.rules import joined_width, resolve_reading

    facts = settings.facts
    assert facts is not None, f"{settings.name}: every encoder that ships says what its model is"
    blocks, reading = resolve_reading(settings, facts.blocks)
    width = joined_width(reading, facts.width)
    return {
        "name": name,
        "system": facts.system,
        "model": settings.model,
        "layers": list(reading.layers or (blocks,)),
        "blocks": facts.blocks,
        "join": reading.join if reading.layers else "one",
        "width": width,
        # the token's id, and its scale where eight bits need one
        "bytes": round(width * BYTES[settings.storage])
        + 4
        + (4 if settings.storage == "int8" else 0),
        "pooled": settings.pooled,
        "pipeline": settings.condition.pipeline if settings.condition else None,
        "licence": facts.licence,
    }


if __name__ == "__main__":
    run(command)
