"""Distilling a model: `distill` is the driver, `distill_worker` the loop, `DistillJob` what differs
from a training.

Every stage is an ordinary training run whose loss asks a teacher: `Lessons` says what the student
is to predict. The next stage's teacher is the model that a stage has published.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lidit.config import SamplerSettings
from lidit.config.distill import Distillation, DistillStage, StudentRecipe
from lidit.data.assembler import TrainingBatch
from lidit.data.matching import matching_latents
from lidit.diffusion import Objective, build_objective
from lidit.diffusion.distillation import Lessons, Teacher
from lidit.diffusion.jumps import JumpGrid
from lidit.errors import InputError
from lidit.models import LIDiT, TextStates
from lidit.pipeline import LIDiTPipeline
from lidit.store import Corpus
from pipelines.evaluation.models import weights_digest
from pipelines.training.driver import TrainResult
from pipelines.training.engine import Engine
from pipelines.training.inherit import check_states, codec_of, shape_of
from pipelines.training.loop import reports_failure
from pipelines.training.train import TrainingJob, take_all_steps, train

# -- the driver -----------------------------------------------------------------------------------


def distill(distillation: Distillation, allow_drift: bool = False) -> list[TrainResult]:
    """Train a student per stage, each after the one before it, from wherever their runs stand.

    The last student is OUTPUT/NAME, those before it OUTPUT/NAME-stage1 and so on. Each names the
    digest of its teacher's weights, in its run and in its model card.

    Raises InputError, before anything is started, for a teacher that was trained on other states or
    latents than the corpus has, and for steps that its objective cannot take; JobError where a
    training failed.
    """
    corpus = Corpus.open(distillation.corpus)
    results: list[TrainResult] = []
    teacher = Path(distillation.teacher)
    for number, stage in enumerate(distillation.stages, start=1):
        last = number == len(distillation.stages)
        name = distillation.name if last else f"{distillation.name}-stage{number}"
        recipe = student_recipe(distillation, stage, name, teacher)
        check_teacher(recipe, corpus)
        digest = weights_digest(teacher)
        tags = {"lidit.job": "distill", "lidit.teacher": digest}
        results.append(train(recipe, allow_drift, tags, distill_worker, {"teacher": digest}))
        teacher = results[-1].model
    return results


def student_recipe(
    distillation: Distillation, stage: DistillStage, name: str, teacher: Path
) -> StudentRecipe:
    """A stage as the training engine takes it: shape, objective, states and codec are the
    teacher's.
    """
    pipe = LIDiTPipeline.from_pretrained(teacher)
    steps = stage.train_steps or distillation.train.steps
    return StudentRecipe(
        name=name,
        output=distillation.output,
        corpus=distillation.corpus,
        encoders=tuple(encoder.settings for encoder in pipe.encoders.values()),
        codec=distillation.codec or codec_of(pipe),
        model=shape_of(pipe.model, distillation.activation_checkpointing),
        objective=pipe.objective.settings,
        data=distillation.data,
        train=distillation.train.model_copy(update={"steps": steps}),
        engine=distillation.engine,
        tracking=distillation.tracking,
        sampler=_student_sampler(pipe, stage),
        evaluate=distillation.evaluate,
        teacher=str(teacher.resolve()),
        distill=stage.model_dump(exclude={"train_steps"}),
    ).keep_written(distillation.written)


def check_teacher(recipe: StudentRecipe, corpus: Corpus) -> None:
    """Raise InputError unless the corpus holds the very states that the teacher was trained on, and
    steps can be taken.
    """
    pipe = LIDiTPipeline.from_pretrained(recipe.teacher, check_files=False)
    check_states(Path(recipe.teacher), corpus)
    latents = corpus.latent_family(matching_latents(corpus, recipe.codec)).shapes(0)[0]
    if latents[0] != pipe.model.config.channels:
        raise InputError(
            f"{corpus.folder.location}: its latents have {latents[0]} channels, "
            f"{recipe.teacher} draws "
            f"{pipe.model.config.channels}; give the codec of the teacher (codec.model=...)"
        )
    if recipe.distill.kind != "guidance":
        # refuses what the objective cannot tell apart
        JumpGrid.of(pipe.objective, *recipe.distill.walk_steps)
    pipe.objective.scheduler(recipe.sampler)


def _student_sampler(pipe: LIDiTPipeline, stage: DistillStage) -> SamplerSettings:
    """How the student samples: in one evaluation per step, along the walk that it was taught.

    Its weights have learnt guidance, at one scale or at the one that they are told.
    """
    sampler = pipe.sampler
    told = pipe.model.takes_guidance or stage.guidance_range is not None
    return SamplerSettings(
        steps=stage.sampler_steps or sampler.steps,
        guidance_scale=sampler.guidance_scale if told else 1.0,
        scheduler=sampler.scheduler if stage.kind == "guidance" else "auto",
    )


# -- the loop -------------------------------------------------------------------------------------


@reports_failure
def distill_worker(config: dict[str, Any]) -> None:
    """What every worker runs. `config`: as of `train_worker`, with a `StudentRecipe`."""
    take_all_steps(DistillJob(config))


class DistillEngine(Engine):
    """LI-DiT's engine with a loss that asks the teacher. Every worker holds the teacher whole."""

    def __init__(
        self, recipe: StudentRecipe, model: LIDiT, objective: Objective, teacher: Teacher
    ) -> None:
        super().__init__(recipe, model, objective, next(teacher.model.parameters()).device)
        self.lessons = Lessons(recipe.distill, teacher)

    def loss(self, batch: TrainingBatch) -> torch.Tensor:
        text = {name: states.rounded(self._length_multiple) for name, states in batch.text.items()}

        def student(
            x_t: torch.Tensor, t: torch.Tensor, guidance: torch.Tensor | None
        ) -> torch.Tensor:
            predicted: torch.Tensor = self.deepspeed(
                x_t.to(self.compute_dtype), t, text, guidance=guidance
            )
            return predicted

        example = self.lessons.example(batch.latents, batch.noise, batch.u, text, student)
        prediction = student(example.x_t, example.t, example.guidance)
        return example.loss(self.objective, prediction).mean()


class DistillJob(TrainingJob):
    """A training that starts from its teacher's weights and learns from its predictions."""

    recipe: StudentRecipe
    reads = StudentRecipe

    def untrained(self, recipe: StudentRecipe) -> LIDiT:  # type: ignore[override]
        """The teacher's network, with the guidance scale as an input where the stage or the teacher
        has it.
        """
        return student_network(_network(recipe), recipe)

    def initial(self, recipe: StudentRecipe) -> LIDiT:  # type: ignore[override]
        """With the teacher's weights and statistics: its states are the corpus's, as the driver has
        checked.
        """
        torch.manual_seed(recipe.data.seed)  # of what the teacher has no weights for
        return self.untrained(recipe).train()

    def network(self, recipe: StudentRecipe) -> LIDiT:  # type: ignore[override]
        """Whole on every rank, which reads the teacher's files anyway."""
        return self.initial(recipe)

    def make_engine(self, recipe: StudentRecipe, model: LIDiT, device: torch.device) -> Engine:  # type: ignore[override]
        objective = build_objective(recipe.objective)
        sampler = LIDiTPipeline.from_pretrained(recipe.teacher, check_files=False).sampler
        low = recipe.engine.precision == "bfloat16" and device.type == "cuda"
        network = _network(recipe, torch.bfloat16 if low else None).to(device)
        shared = {name: family.shared() for name, family in self.families.texts.items()}
        empty = {
            name: TextStates.collate([it.empty], it.prefix).to(device)
            for name, it in shared.items()
        }
        return DistillEngine(recipe, model, objective, Teacher(network, objective, empty, sampler))


def student_network(teacher: LIDiT, recipe: StudentRecipe) -> LIDiT:
    """A student that predicts what its teacher does: a guidance input that it gets is zero at
    start.
    """
    config = {name: value for name, value in teacher.config.items() if not name.startswith("_")}
    takes = teacher.takes_guidance or recipe.distill.guidance_range is not None
    student = LIDiT(**{**config, "guidance_input": takes})
    found = student.load_state_dict(teacher.state_dict(), strict=False)
    assert all(name.startswith("transformer.guidance_embedder.") for name in found.missing_keys)
    if recipe.model.activation_checkpointing:
        student.enable_gradient_checkpointing()
        student.transformer.checkpointed_every = recipe.model.checkpointed_every or 1
    return student


def _network(recipe: StudentRecipe, dtype: torch.dtype | None = None) -> LIDiT:
    return LIDiT.load(Path(recipe.teacher) / "model", dtype)
