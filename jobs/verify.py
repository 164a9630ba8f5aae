"""`lidit verify`: is a corpus, or a model folder, what was written?"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from jobs.support.start import run
from lidit.errors import InputError, JobError

if TYPE_CHECKING:
    from lidit.store.checks.report import VerifyReport


def command(
    corpus: Annotated[
        str, typer.Argument(help="Corpus folder or s3:// address; or a model folder.")
    ],
    deep: Annotated[
        bool, typer.Option("--deep", help="Every value too: finite, aligned, captions' digests.")
    ] = False,
    sources: Annotated[
        bool, typer.Option("--sources", help="Source files too; reads all their pictures.")
    ] = False,
    encode: Annotated[
        int, typer.Option(min=0, help="Rows of each text family to compute again; loads the LLMs.")
    ] = 0,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object instead of lines.")
    ] = False,
) -> None:
    """Check every file of a corpus against what was recorded when it was written: size, sha256,
    rows, Arrow structure.
    Of a model folder: size and sha256 of every weight and settings file, and that it loads.

    **Reads** everything in CORPUS, with --sources what it was ingested from, too. **Writes**
    nothing. Exit code 1 when anything is wrong, with a line for each problem that says what to do;
    unfinished families are no problem.

    **Example:** `lidit verify corpus --deep`
    """
    if (Path(corpus) / "model_index.json").is_file():
        found = check_model_folder(Path(corpus))
        print(
            json.dumps({"sound": True, "checked": found})
            if as_json
            else f"{corpus}: sound, {found}"
        )
        return
    report = check(corpus, deep, encode)
    changed, compared = changed_sources(corpus) if sources and report.sound else ([], 0)
    if as_json:
        print(
            json.dumps(
                {"sound": report.sound and not changed, **asdict(report), "sources": changed},
                indent=1,
            )
        )
    for line in () if as_json else (*report.notes, *report.problems, *changed):
        print(line)
    if not report.sound:
        count = len(report.problems)
        raise JobError(
            f"{corpus}: {count} problem{'s'[: count != 1]} in {report.files} files; lidit "
            f"repair {corpus}"
        )
    if changed:
        raise JobError(
            f"{corpus}: {len(changed)} of {compared} source files are not what was ingested; "
            "put the old files back "
            "before lidit latents reads them, or ingest anew"
        )
    if not as_json:
        again = f", {report.rows_encoded_again} rows computed again" if encode else ""
        print(f"{corpus}: sound, {report.files} files, {report.bytes:,} bytes{again}")


def check_model_folder(folder: Path) -> str:
    """What was checked of a model folder. JobError where a file is not the one that was saved, or
    does not load.
    """
    import diffusers

    from lidit.pipeline import LIDiTPipeline
    from lidit.pipeline.checksums import check_model

    diffusers.utils.logging.disable_progress_bar()  # it counts loaded parts, of which there is one
    try:
        checked = check_model(folder, True)
        LIDiTPipeline.from_pretrained(folder, check_files=False)
    except InputError as error:
        raise JobError(str(error)) from None
    return (
        f"{checked} files" if checked else "it loads; an earlier release saved it without checksums"
    )


def check(corpus: str, deep: bool, encode: int = 0) -> VerifyReport:
    """Verify with a progress bar."""
    import torch

    from lidit.store import TextFamily
    from lidit.store.verify import verify_corpus
    from lidit.text import PromptEncoder
    from lidit.text.embedding import family_encoder
    from pipelines.runtime.progress import ProgressBar

    loaded: dict[str, PromptEncoder] = {}

    def computed_again(family: TextFamily, captions: Sequence[str]) -> list[torch.Tensor]:
        if family.fingerprint not in loaded:
            loaded.clear()  # one LLM in memory at a time
            loaded[family.fingerprint] = family_encoder(family)
        return [found.states for found in loaded[family.fingerprint].encode(list(captions))]

    with ProgressBar("verify", None, "files") as progress:
        return verify_corpus(corpus, deep, computed_again if encode else None, encode, progress)


def changed_sources(corpus: str) -> tuple[list[str], int]:
    """Which of the files that the corpus was ingested from are others now, a line each, and how
    many were compared.
    """
    from lidit.sources.changes import compare_sources
    from lidit.store import Corpus
    from pipelines.runtime.progress import ProgressBar

    opened = Corpus.open(corpus)
    changed = []
    with ProgressBar("verify sources", opened.sources.num_rows, "files") as progress:
        for path, reason in compare_sources(opened):
            changed += [f"{path}: {reason}"] if reason else []
            progress.advance(1)
    return changed, opened.sources.num_rows


if __name__ == "__main__":
    run(command)
