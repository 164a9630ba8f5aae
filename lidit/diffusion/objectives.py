"""What the network predicts and how it is trained: three objectives behind one small interface.

Timesteps are floats in [0, 1]: 0 is data, 1 is noise. All arithmetic is float32 whatever the
network's dtype.

Shapes: B batch, C latent channels, H x W latent size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
)

from lidit.config import ObjectiveSettings, SamplerSettings
from lidit.errors import InputError

BETA_START, BETA_END, BETA_SCHEDULE = 1e-4, 0.02, "linear"  # DDPM's own, also DiT's and PixArt's
CLEAN_FLOOR = 0.1
FLOW_TRAIN_STEPS = 1000


class Objective(ABC):
    """How data become noise, what the loss compares, and which diffusers scheduler walks back."""

    kind: str
    train_steps: int
    schedulers: tuple[str, ...]  # the first is "auto"

    def __init__(self, settings: ObjectiveSettings) -> None:
        self.settings = settings

    @abstractmethod
    def timesteps(self, u: torch.Tensor) -> torch.Tensor:
        """Uniform u [B] in [0, 1) -> timesteps [B], float32."""

    @abstractmethod
    def add_noise(self, x0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """x_t [B, C, H, W] between data x0 (t = 0) and noise (t = 1)."""

    @abstractmethod
    def loss(
        self,
        prediction: torch.Tensor,
        x0: torch.Tensor,
        noise: torch.Tensor,
        t: torch.Tensor,
        x_t: torch.Tensor,
    ) -> torch.Tensor:
        """Mean squared error of each sample, [B], float32."""

    @abstractmethod
    def scheduler_input(
        self, prediction: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor
    ) -> torch.Tensor:
        """The prediction in the form the scheduler takes: noise, or velocity dx/dt =
        noise - data.
        """

    @abstractmethod
    def estimate(
        self, prediction: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor
    ) -> torch.Tensor:
        """The data x0 [B, C, H, W] that a prediction at x_t and t [B] points to, float32."""

    @abstractmethod
    def prediction(self, x0: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """The prediction at x_t and t [B] that points to the data x0, float32: the inverse of
        `estimate`.
        """

    @abstractmethod
    def path(self, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Shares of data and of noise in x_t at t [B], float32; `clean_end` has no noise."""

    @property
    def clean_end(self) -> float:
        """Where the last step of a walk lands: below the lowest timestep where that
        one has noise.
        """
        return 0.0

    @abstractmethod
    def scheduler(self, sampler: SamplerSettings) -> Any:
        """A diffusers scheduler with its timesteps set. Raises InputError for one that cannot run
        this objective.
        """

    @abstractmethod
    def sampling_timesteps(self, scheduler: Any) -> torch.Tensor:
        """t of each step that `scheduler` takes, [steps], float32."""

    def scheduler_name(self, sampler: SamplerSettings) -> str:
        name = self.schedulers[0] if sampler.scheduler == "auto" else sampler.scheduler
        if name not in self.schedulers:
            raise InputError(
                f"sampler.scheduler: {name!r} cannot sample the objective {self.kind!r}; "
                f"choose one of {', '.join(self.schedulers)}"
            )
        return name


class NoisePrediction(Objective):
    """DDPM: x_t = sqrt(a_t) x0 + sqrt(1 - a_t) noise, the network predicts the noise (paper
    appendix A.1).

    Step k of K is t = k / K. Betas are linear from 1e-4 to 0.02.
    """

    kind = "ddpm"
    schedulers = ("ddim", "dpm_solver", "ddpm")

    def __init__(self, settings: ObjectiveSettings) -> None:
        super().__init__(settings)
        self.train_steps = settings.train_steps
        betas = torch.linspace(BETA_START, BETA_END, self.train_steps, dtype=torch.float32)
        self.alphas_cumprod = torch.cumprod(1 - betas, dim=0)
        self._signals = {torch.device("cpu"): self.alphas_cumprod}  # a copy waits for the GPU

    def timesteps(self, u: torch.Tensor) -> torch.Tensor:
        u = logit_normal(u) if self.settings.timesteps == "logit_normal" else u
        step = (u.double() * self.train_steps).floor().clamp(0, self.train_steps - 1)
        return (step / self.train_steps).float()

    def add_noise(self, x0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        signal = self._signal(t, x0)
        return signal.sqrt() * x0.float() + (1 - signal).sqrt() * noise.float()

    def loss(
        self,
        prediction: torch.Tensor,
        x0: torch.Tensor,
        noise: torch.Tensor,
        t: torch.Tensor,
        x_t: torch.Tensor,
    ) -> torch.Tensor:
        return (prediction.float() - noise.float()).square().flatten(1).mean(1)

    def scheduler_input(
        self, prediction: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor
    ) -> torch.Tensor:
        return prediction.float()

    def estimate(
        self, prediction: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor
    ) -> torch.Tensor:
        signal = self._signal(t, x_t)
        return (x_t.float() - (1 - signal).sqrt() * prediction.float()) / signal.sqrt()

    def prediction(self, x0: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        signal = self._signal(t, x_t)
        return (x_t.float() - signal.sqrt() * x0.float()) / (1 - signal).sqrt()

    def path(self, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        # Step 0 has a little noise; what lies below it has none, as where diffusers' last step
        # lands.
        signal = torch.where(t < 0, torch.ones_like(t), self._signal(t, t))
        return signal.sqrt(), (1 - signal).sqrt()

    @property
    def clean_end(self) -> float:
        return -1 / self.train_steps

    def scheduler(self, sampler: SamplerSettings) -> Any:
        name = self.scheduler_name(sampler)
        if sampler.steps > self.train_steps:
            raise InputError(
                f"sampler.steps: {sampler.steps}, but the objective has {self.train_steps} "
                "noise levels "
                "(objective.train_steps); take fewer steps"
            )
        # "trailing" starts at the last, noisiest step; "leading" would start short of it (arXiv
        # 2305.08891).
        common = {
            "num_train_timesteps": self.train_steps,
            "beta_start": BETA_START,
            "beta_end": BETA_END,
            "beta_schedule": BETA_SCHEDULE,
            "prediction_type": "epsilon",
            "timestep_spacing": "trailing",
        }
        if name == "dpm_solver":
            scheduler = DPMSolverMultistepScheduler(**common, algorithm_type="dpmsolver++")
        else:
            scheduler = (DDIMScheduler if name == "ddim" else DDPMScheduler)(
                **common, clip_sample=False
            )
        scheduler.set_timesteps(sampler.steps)
        return scheduler

    def sampling_timesteps(self, scheduler: Any) -> torch.Tensor:
        return scheduler.timesteps.float() / self.train_steps

    def _signal(self, t: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        step = (t.double() * self.train_steps).round().long().clamp(0, self.train_steps - 1)
        if t.device not in self._signals:
            self._signals[t.device] = self.alphas_cumprod.to(t.device)
        return _per_sample(self._signals[t.device][step], like)


class RectifiedFlow(Objective):
    """x_t = (1 - t) x0 + t noise, the network predicts the velocity noise - x0 (arXiv 2209.03003,
    2403.03206).
    """

    kind = "rectified_flow"
    train_steps = FLOW_TRAIN_STEPS
    schedulers = ("euler", "dpm_solver")

    def timesteps(self, u: torch.Tensor) -> torch.Tensor:
        return u.float() if self.settings.timesteps == "uniform" else logit_normal(u)

    def add_noise(self, x0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        level = _per_sample(t.float(), x0)
        return (1 - level) * x0.float() + level * noise.float()

    def loss(
        self,
        prediction: torch.Tensor,
        x0: torch.Tensor,
        noise: torch.Tensor,
        t: torch.Tensor,
        x_t: torch.Tensor,
    ) -> torch.Tensor:
        velocity = noise.float() - x0.float()
        return (prediction.float() - velocity).square().flatten(1).mean(1)

    def scheduler_input(
        self, prediction: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor
    ) -> torch.Tensor:
        return prediction.float()

    def estimate(
        self, prediction: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor
    ) -> torch.Tensor:
        return x_t.float() - _per_sample(t.float(), x_t) * prediction.float()

    def prediction(self, x0: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return (x_t.float() - x0.float()) / _per_sample(t.float(), x_t)

    def path(self, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return 1 - t.float(), t.float()

    def scheduler(self, sampler: SamplerSettings) -> Any:
        if self.scheduler_name(sampler) == "dpm_solver":
            solver = DPMSolverMultistepScheduler(
                num_train_timesteps=self.train_steps,
                prediction_type="flow_prediction",
                use_flow_sigmas=True,
            )
            solver.set_timesteps(sampler.steps)
            return solver
        euler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=self.train_steps)
        # Left to itself the scheduler spends its last step on the final thousandth.
        euler.set_timesteps(sigmas=[1 - i / sampler.steps for i in range(sampler.steps)])
        return euler

    def sampling_timesteps(self, scheduler: Any) -> torch.Tensor:
        # Not its timesteps: DPM-Solver's are whole thousandths, cut off, and its last one may be 0.
        return scheduler.sigmas[:-1].float()


class CleanPrediction(RectifiedFlow):
    """Rectified flow's path, but the network predicts x0; the loss is taken in velocity space.

    |(prediction - x0) / max(t, 0.1)|^2, since the velocity is (x_t - x0) / t. A narrow network that
    cannot pass all the noise of a patch through its width can still predict the image (3 p^2 > D).
    """

    kind = "clean"

    def loss(
        self,
        prediction: torch.Tensor,
        x0: torch.Tensor,
        noise: torch.Tensor,
        t: torch.Tensor,
        x_t: torch.Tensor,
    ) -> torch.Tensor:
        level = _per_sample(t.float().clamp_min(CLEAN_FLOOR), x0)
        return ((prediction.float() - x0.float()) / level).square().flatten(1).mean(1)

    def scheduler_input(
        self, prediction: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor
    ) -> torch.Tensor:
        # No floor here: the last Euler step then lands exactly on the prediction.
        return (x_t.float() - prediction.float()) / _per_sample(t.float(), x_t)

    def estimate(
        self, prediction: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor
    ) -> torch.Tensor:
        return prediction.float()

    def prediction(self, x0: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return x0.float()


def build_objective(settings: ObjectiveSettings) -> Objective:
    """The objective that `settings` names."""
    objectives: dict[str, type[Objective]] = {
        objective.kind: objective for objective in (NoisePrediction, RectifiedFlow, CleanPrediction)
    }
    return objectives[settings.kind](settings)


def logit_normal(u: torch.Tensor) -> torch.Tensor:
    """sigmoid(standard normal) from uniform u by the inverse distribution function (arXiv
    2403.03206, section 3.1).
    """
    inside = u.double().clamp(1e-6, 1 - 1e-6)  # u = 0 would be t = 0 exactly: nothing to denoise
    return torch.sigmoid(torch.special.ndtri(inside)).float()


def _per_sample(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """[B] -> [B, 1, 1, 1] beside `like`."""
    return values.to(like.device).view(-1, *[1] * (like.dim() - 1))
