"""Part 2: the training step of the 1B shape, where its time goes, and what would shorten it."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.gpu import timing
from benchmarks.gpu.run import Run
from benchmarks.gpu.trainer import Trainer, recompile, uncompile

COMPILING = 25  # seconds that a new set of graphs may take


def part_2(run: Run) -> None:
    """Eager, then compiled for one shape, then for any length; what explains most comes first."""
    trainer = Trainer(run)
    size = trainer.shape.batch
    _step(run, trainer, "eager", size)
    with timing.cudnn_attention(False):
        _step(run, trainer, "eager, cuDNN off", size)
    for enabled in (True, False):  # half the batch: eager, long captions need the memory
        with timing.cudnn_attention(enabled):
            _drawn(
                run,
                trainer,
                f"eager, drawn, cuDNN {'on' if enabled else 'off'}",
                size // 2,
                1,
                most=6,
            )

    recompile(trainer.model, run, dynamic=False)
    if _step(run, trainer, "compiled", size, needs=COMPILING):
        batch = trainer.batch(size)
        top = run.attempt("compiled, kernels", lambda: _kernels(run, lambda: trainer.step(batch)))
        if top:
            kinds = ", ".join(
                f"{name} {share:.0%}" for name, share in list(top["kinds"].items())[:4]
            )
            run.headline(f"busy {top['busy']:.0%}: {kinds}")
        run.attempt("compiled, conditioner", lambda: conditioner(run, trainer, batch))
        trainer.model.enable_gradient_checkpointing()
        _step(run, trainer, "compiled, checkpointed", size, needs=8)
        trainer.model.disable_gradient_checkpointing()

    recompile(trainer.model, run, dynamic=True)
    if _step(run, trainer, "compiled for any length", size, needs=COMPILING):
        for rounded in (1, 32, 64):
            _drawn(
                run, trainer, f"compiled for any length, drawn, rounded to {rounded}", size, rounded
            )
        # The GPU has next to nothing to do for so few images: this is the time of the launches.
        _step(run, trainer, "compiled for any length, batch 2", 2)

    recompile(trainer.model, run, dynamic=False)
    with timing.cudnn_attention(False):
        _step(run, trainer, "compiled, cuDNN off", size, needs=COMPILING)
    for other in (size // 2, size + size // 2):
        _step(run, trainer, f"compiled, batch {other}", other, needs=COMPILING)
    uncompile(trainer.model)
    for other in (2, size // 2):
        _step(run, trainer, f"eager, batch {other}", other, needs=5)


def _step(
    run: Run, trainer: Trainer, name: str, size: int, needs: float = 6
) -> dict[str, Any] | None:
    found = run.attempt(name, lambda: trainer.measure(size), needs)
    if found:
        run.headline(f"{name} {found['step_ms']:.0f} ms, MFU {found['mfu'] or 0:.0%}")
    return found


def _drawn(run: Run, trainer: Trainer, name: str, size: int, rounded: int, most: float = 9) -> None:
    # Shorter than the limit, so that the other ways of rounding have their turn too.
    found = run.attempt(name, lambda: trainer.as_drawn(size, 60, rounded, most), needs=8)
    if found:
        run.headline(f"{name} {found['images_per_second']:.0f} images/s")


def _kernels(run: Run, work: Any) -> dict[str, Any]:
    return timing.kernels(run, work, steps=1 if run.toy else 3, top=10 if run.toy else 25)


def conditioner(run: Run, trainer: Trainer, batch: dict[str, Any]) -> dict[str, Any]:
    """The conditioner's forward and backward pass alone, and its kernels."""

    def work() -> None:
        trainer.condition(batch)

    seconds = timing.median(run, work, rounds=1 if run.toy else 7)
    run.headline(f"conditioner {1e3 * seconds:.1f} ms")
    with torch.no_grad():
        forward = timing.median(
            run,
            lambda: trainer.model.conditioner(batch["text"], batch["t"]),
            rounds=1 if run.toy else 5,
        )
    return {
        "ms": round(1e3 * seconds, 2),
        "forward_ms": round(1e3 * forward, 2),
        **_kernels(run, work),
    }
