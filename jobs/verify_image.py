"""`lidit verify-image`: was this picture made here?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from jobs.support.start import run

if TYPE_CHECKING:
    from lidit.serving.provenance.verify import PictureFinding


def command(
    file: Annotated[Path, typer.Argument(help="PNG, JPEG or WebP.")],
    log: Annotated[
        Path | None, typer.Option(help="issued.sqlite, in the folder of `lidit serve`.")
    ] = None,
    watermark: Annotated[
        Path | None, typer.Option(help="watermark.key, in the folder of `lidit serve`.")
    ] = None,
    roots: Annotated[
        Path | None, typer.Option(help="PEM of the root under which pictures are signed here.")
    ] = None,
) -> None:
    """Ask a picture's signed manifest, its watermark and the log of issued pictures where it comes
    from.

    **Reads** FILE and what the options name. **Writes** nothing. The first word is "made here"
    (these very bytes), "altered" (it comes from a picture made here, or a signature does not fit
    it) or "unknown", which proves nothing: marks can be removed. Exit code 0 for "made here", else
    1.

    **Example:** `lidit verify-image picture.png --log serving/issued.sqlite`
    """
    from lidit.errors import InputError
    from lidit.serving.provenance.issued import IssuedLog
    from lidit.serving.provenance.manifest import ProvenanceUnavailable
    from lidit.serving.provenance.verify import verify_picture
    from lidit.serving.provenance.watermark import Watermark

    try:
        found = verify_picture(
            file.read_bytes(),
            IssuedLog(log) if log else None,
            Watermark(watermark.read_bytes()) if watermark else None,
            roots.read_text("ascii") if roots else None,
        )
    except InputError as error:
        raise InputError(f"{file}: {error}") from None
    except ProvenanceUnavailable as error:
        raise InputError(f"{error}; give the log by --log") from None
    print(f"{file}: {found.answer}")
    for line in describe(found, log is not None, watermark is not None):
        print(f"  {line}")
    if not found.made_here:
        raise typer.Exit(1)


def describe(found: PictureFinding, logged: bool, marked: bool) -> list[str]:
    """A line for each mark that was asked."""
    manifest = found.manifest
    detail = {
        "absent": "none",
        "invalid": f"does not fit the file ({manifest.reason})",
        "untrusted": f"whole, by a signer that is not known here, generator {manifest.generator}",
        "trusted": f"whole, signed here, {manifest.manifest}",
    }
    lines = [f"manifest   {detail[manifest.state]}"]
    if marked:
        lines.append(
            f"watermark  {'none' if found.watermark is None else f'{found.watermark:08x}'}"
        )
    if logged and found.issued is None:
        lines.append("log        none of its pictures")
    elif found.issued is not None:
        issued = found.issued
        how = {
            "exact": "these bytes",
            "mark": "the watermark",
            "near": f"likeness, {issued.distance} of 64 bits apart",
        }
        lines.append(f"log        request {issued.picture.request}, by {how[issued.match]}")
    return lines


if __name__ == "__main__":
    run(command)
