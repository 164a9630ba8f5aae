"""`lidit plan`: what a recipe will cost, before anything is spent."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from jobs.support.start import run

if TYPE_CHECKING:
    from rich.console import Console

    from lidit.config import Recipe
    from lidit.plan import Facts, Plan


def command(
    recipe: Annotated[str, typer.Argument(help="Recipe file, or the name of a shipped one.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Settings to change: plan.gpus=64")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object instead of tables.")
    ] = False,
) -> None:
    """Work out memory per GPU, FLOPs, GPU-hours, corpus size, read bandwidth and cost of a recipe.

    **Reads** the recipe and, where they are there already, its corpus and LLMs; what is not there
    is assumed by the recipe's `plan` section. **Writes** nothing.

    **Example:** `lidit plan lidit-1b plan.gpus=64 plan.mfu=0.35`
    """
    from lidit.config.shipped import load_recipe
    from lidit.errors import InputError

    checked = load_recipe(recipe, overrides)
    from lidit.plan import make_plan
    from lidit.plan.facts import gather_facts

    try:
        facts = gather_facts(checked)
    except InputError as error:
        raise InputError(f"{recipe}: {error}") from None
    plan = make_plan(checked, facts)
    if as_json:
        print(json.dumps(asdict(plan)))
    else:
        _show(checked, facts, plan)


def _show(recipe: Recipe, facts: Facts, plan: Plan) -> None:
    from rich.console import Console
    from rich.table import Table

    from lidit.plan import GPU_SHARE

    console, setting = Console(), recipe.plan
    gpus = setting.gpus or recipe.engine.workers
    console.print(
        f"[bold]{recipe.name}[/bold]: {plan.parameters / 1e6:,.1f} M parameters, {gpus} GPUs"
    )
    channels, height, width = facts.latent
    lengths = ", ".join(f"{name} {facts.caption_tokens[name]:.1f}" for name in facts.encoders)
    console.print(
        f"{facts.samples:,} samples, {facts.captions:,} captions; tokens per caption: "
        f"{lengths}; latents {channels} x "
        f"{height} x {width}; {recipe.train.steps:,} steps of {recipe.train.batch_size}, "
        f"{plan.epochs:.1f} epochs\n"
    )
    micro = max(1, recipe.train.batch_size // (gpus * recipe.engine.accumulation))
    saved = ", activation checkpointing" if recipe.model.activation_checkpointing else ""
    table = Table(
        title=f"Gigabytes per GPU ({recipe.engine.precision}, micro-batch {micro}{saved})",
        title_justify="left",
    )
    for column in (
        "ZeRO stage",
        "states",
        "buffers",
        "activations",
        "all",
        f"in {setting.gpu_gigabytes:.0f} GB",
    ):
        table.add_column(column, justify="right")
    for stage, memory in plan.memory.items():
        parts = (memory.states, memory.buffers, memory.activations, memory.total)
        fits = "yes" if memory.total < GPU_SHARE * 1e9 * setting.gpu_gigabytes else "no"
        mark = f"{stage} (recipe)" if stage == recipe.engine.zero_stage else str(stage)
        table.add_row(mark, *(f"{part / 1e9:.1f}" for part in parts), fits)
    console.print(table)

    table = Table(title="\nGigabytes on disk, by storage dtype", title_justify="left")
    for column in ("family", "float32", "bfloat16", "8 bits", "int4", "coded"):
        table.add_column(column, justify="left" if column == "family" else "right")
    for encoder in recipe.encoders:
        sizes = plan.text_bytes[encoder.name]
        chosen = "bfloat16" if encoder.storage == "compute" else encoder.storage
        cells = [
            f"{size / 1e9:,.1f}" + (" (recipe)" if name == chosen else "")
            for name, size in sizes.items()
        ]
        table.add_row(f"text/{encoder.name}", *cells)
    held = {facts.latent_storage: f"{plan.latent_bytes / 1e9:,.1f}"}
    table.add_row(
        f"latents/{recipe.codec.name}",
        *(held.get(name, "") for name in ("float32", "bfloat16", "uint8")),
    )
    console.print(table)
    _show_states(recipe, plan, console)

    hours = ", ".join(f"{name} {each:,.1f}" for name, each in plan.embed_gpu_hours.items())
    repeated = (
        f"{facts.repeated:.0%} of the captions stand in several units" if facts.repeated else ""
    )
    bandwidth = plan.read_bytes_per_second_per_node / 1e6
    fetched = plan.fetched_bytes_per_second_per_node / 1e6
    for label, text in (
        (
            "embedding",
            f"{hours} GPU-hours at {setting.embed_mfu:.0%} of {setting.peak_tflops:.0f} TFLOP/s",
        ),
        *(
            (("repeated", f"{repeated}: lidit embed --distinct computes each once"),)
            if repeated
            else ()
        ),
        (
            "a step",
            f"{plan.flops_per_step / 1e12:,.3g} TFLOP, {plan.seconds_per_step:.3g} s at "
            f"{setting.mfu:.0%} MFU",
        ),
        ("training", f"{plan.train_gpu_hours:,.1f} GPU-hours, {plan.train_days:,.2f} days"),
        (
            "reading",
            f"{bandwidth:,.1f} MB/s per node of {setting.gpus_per_node} GPUs, "
            f"{plan.bytes_per_sample:,.0f} bytes a sample; behind a URL {fetched:,.1f} MB/s, "
            "latents by whole units",
        ),
        ("recomputing", recomputing(recipe, plan)),
        ("cost", f"{plan.cost:,.0f} at {setting.price_per_gpu_hour:g} per GPU-hour"),
    ):
        console.print(f"  {label:<11} {text}", highlight=False)
    console.print(f"\n  text states: {plan.states.advice}", highlight=False)
    console.print(
        "\nMFU counts three forward passes a step, without recomputation. Captions are counted "
        "at their mean length.",
        style="dim",
    )


def _show_states(recipe: Recipe, plan: Plan, console: Console) -> None:
    """What the text states cost when they are stored, and when they are computed as training needs
    them.
    """
    from rich.table import Table

    states, setting = plan.states, recipe.plan
    table = Table(
        title=f"\nText states, {states.passes:.1f} passes over the captions", title_justify="left"
    )
    for column in ("", "TB", "a month", f"encoding + {setting.months:g} mo.", "GB/s per node"):
        table.add_column(column, justify="right" if column else "left")
    for name, size in states.terabytes.items():
        money = (states.monthly[name], states.totals[name])
        table.add_row(
            f"store {name}",
            f"{size:,.3g}",
            *(f"{m:,.0f}" for m in money),
            f"{states.gigabytes_per_second[name]:,.3g}",
        )
    rolling = states.roll_terabytes * setting.price_per_terabyte_month
    table.add_row(
        "roll", f"{states.roll_terabytes:,.3g}", f"{rolling:,.0f}", f"{states.roll_total:,.0f}", ""
    )
    console.print(table)
    console.print(
        f"  rolling needs {states.encoders_per_trainer:.2g} encoder GPUs for each training GPU, "
        "and online.ahead of at "
        f"least {states.ahead}",
        highlight=False,
    )


def recomputing(recipe: Recipe, plan: Plan) -> str:
    """Whether blocks must be computed again in the backward pass, for memory at the
    price of time.
    """
    model = recipe.model
    has = (model.checkpointed_every or 1) if model.activation_checkpointing else 0
    if plan.checkpointing is None:
        return (
            "activations do not fit even so; take more GPUs, engine.accumulation or "
            "engine.zero_stage=3"
        )
    if plan.checkpointing == 0:
        needless = (
            "; model.activation_checkpointing=false saves up to a quarter of the time"
            if has
            else ""
        )
        return f"not needed: activations fit{needless}"
    every = "each block" if plan.checkpointing == 1 else f"every {plan.checkpointing}th block"
    if has == plan.checkpointing:
        return f"needed for {every}, as the recipe has it"
    return (
        f"needed for {every}: model.activation_checkpointing=true "
        f"model.checkpointed_every={plan.checkpointing}"
    )


if __name__ == "__main__":
    run(command)
