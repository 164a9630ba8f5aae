"""Jobs of engines in `world_size` real processes: trains tiny models, writes losses as JSON."""

import contextlib
import gc
import json
import math
import multiprocessing
import os
import warnings
from pathlib import Path

import torch
import torch.distributed as dist

from lidit.config import Recipe
from lidit.data.assembler import TrainingBatch
from lidit.diffusion import build_objective
from lidit.models import LIDiT, TextStates
from pipelines.training import checkpoints
from pipelines.training.ema import averaged_model, full_shapes, gather_full
from pipelines.training.engine import Engine
from pipelines.training.gradients import measure_at_once

BATCH, CHANNELS, SIDE = 12, 3, 8


def launch(folder: Path, world_size: int, jobs: list[dict]) -> dict:
    """Run the jobs one after the other in `world_size` processes; each job's losses, norms and
    flags.
    """
    (folder / f"store-{world_size}").unlink(missing_ok=True)
    # torch and DeepSpeed are loaded once, not in every process
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "deepspeed"])
    processes = [
        context.Process(target=work, args=(rank, world_size, folder, jobs))
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(500)
    ends = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    told = (folder / f"rank-{rank}-of-{world_size}.log" for rank in range(world_size))
    assert not any(ends), "\n".join(log.read_text()[-3000:] for log in told if log.exists())
    assert None not in ends, "it hangs"
    return json.loads((folder / f"results-{world_size}.json").read_text())


def work(rank: int, world_size: int, folder: Path, jobs: list[dict]) -> None:
    """One of the processes."""
    log = os.open(
        folder / f"rank-{rank}-of-{world_size}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    )
    for stream in (1, 2):
        os.dup2(log, stream)
    # DeepSpeed looks for a launcher's variables before it believes the process group that is there.
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    torch.set_num_threads(1)
    store = f"file://{folder}/store-{world_size}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size)
    results = {job["name"]: run(job, rank, world_size, folder) for job in jobs}
    if rank == 0:
        (folder / f"results-{world_size}.json").write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()


def live_bytes() -> int:
    """Bytes of all tensors alive in this process, each storage once."""
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]
    storages = {
        tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in found
    }
    return sum(storages.values())


def recipe_of(job: dict, world_size: int) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "engine",
            "corpus": "none",
            "encoders": [{"name": "a", "model": "none"}, {"name": "b", "model": "none"}],
            "model": {
                "width": 32,
                "depth": 1,
                "heads": 2,
                "patch_size": 4,
                "refiner": {"depth": 1},
                **job.get("model", {}),
            },
            "objective": {"kind": "clean"},
            "train": {
                "steps": 20,
                "batch_size": job.get("batch", BATCH),
                "ema_decay": 0.9,
                "optimizer": {
                    "lr": 3e-3,
                    "weight_decay": 0.01,
                    "warmup_steps": 3,
                    **job.get("optimizer", {}),
                },
            },
            "engine": {"workers": world_size, **job["engine"]},
        }
    )


def global_batch(step: int, poisoned: int | None = None, size: int = BATCH) -> TrainingBatch:
    """`poisoned`: the row whose latents are not numbers."""
    generator = torch.Generator().manual_seed(step)
    draw = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    mask = torch.arange(5)[None] < torch.randint(1, 6, (size, 1), generator=generator)
    text = {
        "a": TextStates(draw(size, 5, 16), mask, draw(3, 16)),
        "b": TextStates(draw(size, 5, 24), mask, draw(0, 24)),
    }
    u = torch.rand(size, generator=generator)
    latents = draw(size, CHANNELS, SIDE, SIDE)
    if poisoned is not None:
        latents[poisoned] = float("nan")
    noise = draw(size, CHANNELS, SIDE, SIDE)
    return TrainingBatch(
        step,
        tuple(str(i) for i in range(size)),
        latents,
        noise,
        u,
        text,
        tokens=int(mask.sum()) * 2,
    )


def run(job: dict, rank: int, world_size: int, folder: Path) -> dict:
    recipe = recipe_of(job, world_size)
    torch.manual_seed(0)
    before = live_bytes() if job.get("measure") else 0
    without_numbers = job.get("numbers_on_rank_zero") and rank > 0
    with torch.device("meta") if without_numbers else contextlib.nullcontext():
        model = LIDiT.from_settings(recipe.model, {"a": 16, "b": 24}, CHANNELS)
    initial = (
        {name: p.detach().clone() for name, p in model.named_parameters()}
        if job.get("watch_average")
        else {}
    )
    count = sum(p.numel() for p in model.parameters())
    engine = Engine(recipe, model, build_objective(recipe.objective), torch.device("cpu"))
    if job.get("at_once"):  # as on a GPU
        measure_at_once(engine.deepspeed.optimizer)
    start = 0
    if "restore" in job:
        start = (
            checkpoints.CheckpointReader(folder / job["restore"])
            .restore(engine.deepspeed, engine.ema)
            .step
        )
    losses, norms, finite = [], [], []
    shapes, plain = full_shapes(engine.deepspeed), None
    for step in range(start, job["steps"]):
        if step == job.get("leave_out"):
            continue
        row = job.get("poisoned_row", 0) if step == job.get("poison") else None
        whole_batch = global_batch(step, row, recipe.train.batch_size)
        part = whole_batch.split(world_size)[rank]
        hook = None
        # a finite loss whose gradient is not, on one worker alone
        if step == job.get("overflow") and rank == 1:
            hook = next(engine.module.parameters()).register_hook(
                lambda g: torch.full_like(g, math.inf)
            )
        result = engine.train_step(part)
        if hook is not None:
            hook.remove()
        losses.append(result.loss)
        norms.append(result.gradient_norm)
        finite.append(result.finite)
        if job.get("watch_average"):  # the textbook average, of whole weights on one process
            whole = gather_full(
                shapes,
                engine.ema.fragments,
                [f.master for f in engine.ema.fragments],
                engine.device,
            )
            decay = min(0.9, (step + 1) / (step + 10))
            if rank == 0:
                plain = plain or initial
                plain = {n: decay * plain[n] + (1 - decay) * w for n, w in whole.items()}
        if "save" in job and step + 1 == job["save_at"]:
            target = folder / job["save"]
            target.mkdir(exist_ok=True)
            dist.barrier()
            position = checkpoints.Position(step + 1, world_size, engine.ema.updates, {})
            checkpoints.save(target, engine.deepspeed, engine.ema, rank, position)
            dist.barrier()
    if job.get("measure"):
        return measured(engine, before, count, world_size)
    masters = [fragment.master for fragment in engine.ema.fragments]
    weights, average = (
        gather_full(shapes, engine.ema.fragments, v, engine.device)
        for v in (masters, engine.ema.average)
    )
    result = {"losses": losses, "norms": norms, "finite": finite}
    if job.get("average_model"):
        empty = (
            LIDiT.from_settings(recipe.model, {"a": 16, "b": 24}, CHANNELS).to("meta")
            if rank == 0
            else None
        )
        found = averaged_model(engine.deepspeed, engine.ema, empty, engine.device)
        result |= {"flops": list(engine.step_flops(part)), "kept_whole": kept_whole(engine)}
        if rank == 0:
            numbers = found.state_dict()
            assert all(torch.equal(numbers[name], value) for name, value in average.items())
            assert not any(tensor.is_meta for tensor in numbers.values())
            assert all(parameter.is_meta for parameter in empty.parameters()), (
                "the numbers are the caller's alone"
            )
    if rank == 0:
        torch.save(
            {"weights": weights, "ema": average, "plain": plain or {}}, folder / f"{job['name']}.pt"
        )
    return result


def kept_whole(engine: Engine) -> list[bool]:
    """Of each parameter under ZeRO-3, whether it is too small to be cut into shares
    between steps.
    """
    return [p.ds_persist for p in engine.module.parameters() if hasattr(p, "ds_persist")]


def measured(engine: Engine, before: int, count: int, world_size: int) -> dict:
    """Bytes the engine keeps between steps, and at the end of a backward pass, when gradients are
    there too.
    """
    between, held = live_bytes() - before, []
    take = engine.deepspeed.step
    engine.deepspeed.step = lambda: (held.append(live_bytes() - before), take())
    engine.train_step(global_batch(0).split(world_size)[dist.get_rank()])
    engine.deepspeed.step = take
    return {"between": between, "held": held[0], "parameters": count}
