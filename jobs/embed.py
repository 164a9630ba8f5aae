"""`lidit embed`: the LLM states of every caption of a corpus, once."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated

import typer

from jobs.support.dry_run import embedding
from jobs.support.options import has_tracker, node_labels
from jobs.support.start import run
from lidit.errors import InputError

if TYPE_CHECKING:
    from lidit.config import EncoderSettings, PoolSettings
    from lidit.data.producer import State
    from pipelines.corpus.embed import EmbedSummary
    from pipelines.corpus.rolling import RollingSummary


def command(
    corpus: Annotated[
        str, typer.Argument(help="Corpus folder written by `lidit ingest`; with --out, captions.")
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Encoder settings: layer=-2")
    ] = None,
    encoder: Annotated[
        list[str] | None,
        typer.Option(help="Encoder file or shipped name; repeat for several LLMs."),
    ] = None,
    rolling: Annotated[
        str | None,
        typer.Option(
            help="Recipe or run folder: compute what its training needs next, until it ends."
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Parquet file for the states of a file of captions.")
    ] = None,
    setting: Annotated[
        list[str] | None, typer.Option("--set", help="The same as a setting without it.")
    ] = None,
    actors: Annotated[int, typer.Option(min=1, help="Encoder actors.")] = 1,
    cpus: Annotated[float, typer.Option(min=0, help="CPUs of an actor.")] = 1,
    gpus: Annotated[float, typer.Option(min=0, help="GPUs of an actor.")] = 0,
    token_budget: Annotated[
        int, typer.Option(min=1, help="Padded tokens of one forward pass.")
    ] = 8192,
    distinct: Annotated[
        bool, typer.Option("--distinct", help="Compute a caption once that several units hold.")
    ] = False,
    node_label: Annotated[
        list[str] | None, typer.Option(help="Ray node label to ask for: lidit/pool=large")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what is left to compute; do nothing.")
    ] = False,
) -> None:
    """Compute and store the states of one or several LLMs for every distinct caption, with Ray Data
    and actor pools.

    **Reads** CORPUS/captions. **Writes** one text family per LLM, CORPUS/text/NAME-FINGERPRINT. The
    same command again computes only missing units, and loads no model when there are none.

    With --out FILE.parquet CORPUS is captions instead, a text file, CSV, JSONL or Parquet, and no
    Ray is started:
    **writes** a row per caption, [tokens, width] each, and FILE.shared.parquet with the
    instruction's states.

    With --rolling RECIPE units are computed in the order of that recipe's training, a few windows
    before it, and deleted behind it: the recipe's `online` section says how many. Encoders, pools
    and settings are the recipe's; --encoder NAME takes one of them.

    **Example:** `lidit embed corpus --encoder smollm2 --encoder gemma3`

    **Example:** `lidit embed corpus --rolling recipe.yaml`

    **Example:** `lidit embed captions.txt --encoder smollm2 --out states.parquet`
    """
    from lidit.config import PoolSettings
    from lidit.config.shipped import load_encoder_settings

    labels = node_labels(node_label)
    pool = PoolSettings(
        actors=actors,
        cpus=cpus,
        gpus=gpus,
        token_budget=token_budget,
        label_selector=labels,
        distinct=distinct,
    )
    if rolling is not None:
        if pool != PoolSettings() or out is not None or dry_run:
            raise InputError(
                "--rolling takes its pools from the recipe: give pool.actors=2 in place of "
                "--actors 2, and leave out --out and --dry-run"
            )
        embed_rolling(corpus, rolling, encoder or [], [*(overrides or []), *(setting or [])])
        return
    if not encoder:
        raise InputError("give an LLM with --encoder, or a recipe with --rolling")
    chosen = [
        load_encoder_settings(name, [*(overrides or []), *(setting or [])]) for name in encoder
    ]
    if out is not None:
        if pool != PoolSettings(gpus=gpus, token_budget=token_budget):
            raise InputError(
                "--out computes in this process: leave out --actors, --cpus, --distinct and "
                "--node-label"
            )
        embed_file(corpus, chosen, pool, out, dry_run)
        return
    if Path(corpus).is_file():
        raise InputError(
            f"{corpus}: a file, not a corpus; its states in one file: --out states.parquet"
        )
    if dry_run:
        from lidit.store import Corpus

        opened = Corpus.open(corpus)
        for settings in chosen:
            print(f"{settings.name}: {embedding(opened, settings, pool)}")
        return
    for settings in chosen:
        embed(corpus, settings, pool)


def embed_file(
    captions: str,
    encoders: Sequence[EncoderSettings],
    pool: PoolSettings,
    out: Path,
    dry_run: bool = False,
) -> None:
    """The states of a file of captions as one Parquet file, in this process.

    dry_run: say how many captions of which model, and load none.
    """
    # Before torch is imported: threads that wait in a loop would take half of the CPU time.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

    from lidit.config import IngestSettings
    from lidit.sources.ingest import ingest

    if out.suffix != ".parquet":
        raise InputError(f"--out {out}: give a file that ends in .parquet")
    if len(encoders) != 1:
        raise InputError(
            f"--out {out} is of one LLM, but {len(encoders)} are named; run the command "
            "once for each"
        )
    (settings,) = encoders
    with TemporaryDirectory(prefix="lidit-embed-") as folder:
        corpus = f"{folder}/corpus"
        made = ingest([captions], corpus, IngestSettings(captions_only=True))
        if dry_run:
            print(f"{made.captions} captions to compute into {out}, model {settings.model}")
        else:
            _embed_into(out, corpus, settings, pool)
    for reason, count in made.reasons.items():
        print(f"  refused {count} x {reason}")


def _embed_into(out: Path, corpus: str, settings: EncoderSettings, pool: PoolSettings) -> None:
    from lidit.store.export import export_states
    from lidit.store.parquet import ParquetLayout
    from lidit.text.local import embed_here
    from pipelines.runtime.progress import ProgressBar

    with ProgressBar(f"embed {settings.name}", None, "captions") as progress:
        family = embed_here(
            corpus, settings, "cuda" if pool.gpus else "cpu", pool.token_budget, progress
        )
    rows = export_states(corpus, out, family.directory, ParquetLayout())
    print(f"{out}: {rows} captions, {family.manifest['tokens']} tokens of width {family.width}")


def embed_rolling(corpus: str, run: str, encoders: Sequence[str], overrides: list[str]) -> None:
    """Produce rolling families for the training of a recipe, until that is finished."""
    import math

    from lidit.config import OnlineSettings
    from lidit.config.shipped import load_recipe
    from lidit.data.credit import credit_of, forget_credit
    from lidit.plan.states import rolling_passes
    from lidit.store import Corpus
    from pipelines.corpus.rolling import RollingRun, announce, most_actors, run_rolling
    from pipelines.runtime import resources
    from pipelines.runtime.progress import ProgressBar

    saved = Path(run) / "recipe.json"  # of a run that was started already
    recipe = load_recipe(str(saved) if saved.is_file() else run, overrides)
    if unknown := set(encoders) - {settings.name for settings in recipe.encoders}:
        raise InputError(f"--encoder {min(unknown)}: the recipe {run} has no encoder of that name")
    chosen = [settings for settings in recipe.encoders if not encoders or settings.name in encoders]
    opened, online = Corpus.open(corpus), recipe.online or OnlineSettings()
    rolling_run = RollingRun(online, credit_of(recipe, opened))
    pools = [recipe.pool_of(settings.name) for settings in chosen]
    most = [most_actors(pool, online) for pool in pools]
    resources.connect(math.ceil(sum(pool.actors * pool.cpus for pool in most)) + 1)
    jobs = [
        announce(corpus, settings, pool, rolling_run)
        for settings, pool in zip(chosen, pools, strict=True)
    ]
    rolling = [job for job in jobs if job is not None]
    resources.check_together(most, "encoders")
    if not recipe.run_folder.exists():
        for job in rolling:
            forget_credit(job.writer().folder, rolling_run.expected)
    for settings, made_ready in zip(chosen, jobs, strict=True):
        if made_ready is None:
            print(f"{corpus}/text: {settings.name} is complete; training reads it as it is")
    computed: dict[str, int] = {}

    def told(state: State) -> None:
        computed[state.family] = state.computed
        note = (
            f"{state.ahead} windows ahead, {state.actors} actors ({state.wanted_actors} would do)"
        )
        progress.update(sum(computed.values()), note)

    passes = rolling_passes(
        recipe.train.steps * recipe.train.batch_size / opened.num_samples, online.keep
    )
    units = math.ceil(passes * opened.num_units) * len(jobs)
    with ProgressBar(f"embed for {recipe.name}", units, "units") as progress:
        made = run_rolling(rolling, rolling_run, told)
    for summary in made:
        show(corpus, summary)


def embed(corpus: str, settings: EncoderSettings, pool: PoolSettings) -> None:
    """Compute one family with a progress bar and say what came of it, cut captions included."""
    from pipelines.corpus.distinct import embed_corpus
    from pipelines.runtime.progress import ProgressBar

    with ProgressBar(f"embed {settings.name}", None, "captions") as progress:
        made = embed_corpus(corpus, settings, pool, progress)
    show(corpus, made)
    if has_tracker():
        from pipelines.corpus.tracked import track_embed

        track_embed(corpus, settings, made)


def show(corpus: str, made: EmbedSummary | RollingSummary) -> None:
    """What came of one family."""
    from pipelines.corpus.rolling import RollingSummary

    if isinstance(made, RollingSummary):
        print(
            f"{corpus}/text/{made.directory}: rolling, {made.computed} units computed, "
            f"{made.met} met on disk, {made.on_disk} left there"
        )
        return
    state = (
        f"{made.computed_units} computed in {made.seconds:.0f} s"
        if made.computed_units
        else "already there"
    )
    print(
        f"{corpus}/text/{made.directory}: {made.captions} captions, {made.tokens} tokens, "
        f"{made.units} units, {state}"
    )
    if made.truncated:
        print(f"  {made.truncated} captions were cut to {made.max_tokens} tokens")
    if made.control:
        print(
            f"  {made.control} captions spell control words of the tokenizer; they were read "
            "as text"
        )
    if made.merged:
        print(
            f"  {made.merged} captions have other tokens together with their instruction; "
            "they were read apart"
        )
    for directory, fields in made.relatives.items():
        print(f"  another family than {directory}: {'; '.join(fields)}")


if __name__ == "__main__":
    run(command)
