"""`lidit audit`: is the log of a served model what was written?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from jobs.support.start import run


def command(
    file: Annotated[Path, typer.Argument(help="audit.jsonl, in the folder of `lidit serve`.")],
    head: Annotated[
        str | None,
        typer.Option(help="Hash that an earlier check printed: the log must still hold that line."),
    ] = None,
) -> None:
    """Check that each line of an audit log holds to the one before it, from the first to the last.

    **Reads** FILE. **Writes** nothing. Exit code 1 and the first bad line where the chain is
    broken. Lines that were cut off at the end are noticed with --head alone: keep the printed hash
    somewhere else.

    **Example:** `lidit audit serving/audit.jsonl`
    """
    from lidit.errors import JobError
    from lidit.serving.audit import ChainBroken, check_chain

    try:
        chain = check_chain(file, head)
    except ChainBroken as broken:
        raise JobError(f"{file}: {broken}") from None
    print(f"{file}: sound, {chain.lines} lines, head {chain.head}")


if __name__ == "__main__":
    run(command)
