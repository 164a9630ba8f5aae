"""`lidit export`: a corpus for teams on other loaders."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from jobs.support.start import run


def command(
    corpus: Annotated[str, typer.Argument(help="Corpus folder or s3:// address.")],
    to: Annotated[
        Literal["webdataset", "parquet", "diffusers"],
        typer.Option(
            help="Tars, Parquet files, or arguments of a public pipeline's call as safetensors."
        ),
    ],
    out: Annotated[str, typer.Option(help="Folder or s3:// address for the files; created.")],
    family: Annotated[
        list[str] | None, typer.Option(help="Text family to include; repeat for several.")
    ] = None,
    images: Annotated[
        bool, typer.Option("--images", help="Include the images, read from their sources.")
    ] = False,
    rows: Annotated[
        Literal["samples", "captions"],
        typer.Option(help="Parquet: a row per sample and caption, or per caption."),
    ] = "samples",
    dtype: Annotated[
        Literal["float32", "float16"], typer.Option(help="Parquet: of the states.")
    ] = "float32",
) -> None:
    """Write one file per unit: keys, captions, metadata, states of the families named, images if
    asked.

    Parquet files are read by pandas, Polars, DuckDB and Hugging Face datasets as [tokens, width];
    beside the folder, OUT.shared.parquet has each LLM's model, instruction, and states of the
    instruction and of the empty caption.

    **Reads** CORPUS and, with --images, the sources. **Writes** OUT; the same command again goes on
    where it stopped, and an OUT with another corpus, format, families or images in it is refused.

    **Example:** `lidit export corpus --to parquet --out exported --family smollm2`
    """
    from lidit.sources.reading import unit_images
    from lidit.store.export import export_corpus
    from lidit.store.parquet import ParquetLayout
    from pipelines.runtime.progress import ProgressBar

    with ProgressBar("export", None, "units") as progress:
        layout = ParquetLayout(rows, dtype) if to == "parquet" else to
        names = export_corpus(
            corpus, out, layout, family or (), unit_images if images else None, progress
        )
    print(f"{out}: {len(names)} files")


if __name__ == "__main__":
    run(command)
