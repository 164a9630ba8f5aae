"""`lidit repair`: take away what is damaged, so that it is computed again."""

from __future__ import annotations

from typing import Annotated

import typer

from jobs.support.start import run
from jobs.verify import check
from lidit.errors import JobError


def command(
    corpus: Annotated[str, typer.Argument(help="Corpus folder or s3:// address.")],
    deep: Annotated[
        bool, typer.Option("--deep", help="Look for wrong values, not only changed bytes.")
    ] = False,
) -> None:
    """Verify a corpus and delete the units of text and latent families that are damaged or missing.

    The next `lidit embed` or `lidit latents` computes just those. What ingest wrote is never
    deleted. **Reads** everything in CORPUS. **Writes** nothing; deletes damaged files of families.

    **Example:** `lidit repair corpus`
    """
    from lidit.store.repair import repair_corpus

    report = check(corpus, deep)
    for line in (*report.notes, *report.problems):
        print(line)
    if report.sound:
        print(f"{corpus}: sound, nothing to repair")
        return
    for name in repair_corpus(corpus, report.problems):
        print(f"removed {name}")
    left = [problem for problem in report.problems if problem.family is None]
    if left:
        raise JobError(
            f"{corpus}: {len(left)} damaged files of the ingest cannot be computed again; "
            f"{left[0].remedy}"
        )
    kinds = {problem.family[0] for problem in report.problems if problem.family}
    print(f"now run: {' and '.join(sorted(f'lidit {_JOBS[kind]}' for kind in kinds))}")


_JOBS = {"text": "embed", "latents": "latents"}


if __name__ == "__main__":
    run(command)
