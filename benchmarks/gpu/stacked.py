"""Models of one shape trained as one: their weights lie side by side, and every kernel works on all
of them.

A small model on a large GPU waits for launches, not for arithmetic: a stack of S models takes as
many launches as one. Each model keeps its own seed, data, gradient norm, moments and average: it is
what training it alone would make of it, but for rounding.

Letters: S models, B samples of each, T caption tokens, W width of an LLM.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import nn
from torch.func import functional_call, stack_module_state, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from lidit.config import LoopSettings
from lidit.data.assembler import TrainingBatch
from lidit.diffusion import Objective
from lidit.models import LIDiT, TextStates
from pipelines.training.schedule import learning_rate

# states, mask, prefix; [S, ...] each
States = Mapping[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


class Stack:
    """S models in training; `models` start it and are not changed by it."""

    def __init__(
        self,
        models: Sequence[LIDiT],
        objective: Objective,
        settings: LoopSettings,
        device: torch.device,
    ) -> None:
        parameters, buffers = stack_module_state([model.to(device) for model in models])
        self.parameters: dict[str, torch.Tensor] = parameters
        self.buffers: dict[str, torch.Tensor] = buffers
        self.shape = copy.deepcopy(models[0]).to("meta")
        self.network = stackable(self.shape)
        self.objective, self.settings, self.steps = objective, settings, 0
        choice = settings.optimizer
        self.optimizer = torch.optim.AdamW(
            list(parameters.values()), lr=choice.lr, betas=choice.betas,
            weight_decay=choice.weight_decay,
            fused=device.type == "cuda",
        )  # fmt: skip
        self.average = [value.detach().clone() for value in parameters.values()]

    def step(self, batches: Sequence[TrainingBatch]) -> torch.Tensor:
        """One step of every model on its own batch; the losses [S], on the device.

        A model whose gradient is not finite is left as it is by this step.
        """
        count, size = len(batches), len(batches[0].keys)
        latents, noise, u = (
            torch.cat([getattr(batch, name) for batch in batches])
            for name in ("latents", "noise", "u")
        )
        t = self.objective.timesteps(u)
        noisy = self.objective.add_noise(latents, noise, t)
        cut = (count, size)
        prediction = self._predict(
            noisy.unflatten(0, cut), t.unflatten(0, cut), side_by_side(batches)
        )
        losses = (
            self.objective.loss(prediction.flatten(0, 1), latents, noise, t, noisy)
            .unflatten(0, cut)
            .mean(1)
        )
        losses.sum().backward()  # models share nothing, so each gradient is of its own loss
        self._clip()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.settings, self.steps)
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            decay = min(self.settings.ema_decay, (self.steps + 1) / (self.steps + 10))
            torch._foreach_lerp_(self.average, list(self.parameters.values()), 1 - decay)
        self.steps += 1
        return losses.detach()

    def _predict(self, noisy: torch.Tensor, t: torch.Tensor, text: States) -> torch.Tensor:
        def one(
            parameters: dict[str, torch.Tensor], buffers: dict[str, torch.Tensor],
            x_t: torch.Tensor,
            level: torch.Tensor, states: States,
        ) -> torch.Tensor:  # fmt: skip
            captions = {name: TextStates(*parts) for name, parts in states.items()}
            predicted: torch.Tensor = functional_call(
                self.network, (parameters, buffers), (x_t, level, captions)
            )
            return predicted

        # The fused kernels of attention know no stacks; at these sizes scores fit into memory.
        with sdpa_kernel(SDPBackend.MATH):
            predicted: torch.Tensor = vmap(one)(self.parameters, self.buffers, noisy, t, dict(text))
        return predicted

    @torch.no_grad()
    def _clip(self) -> None:
        """Scale each model's gradients to its own norm."""
        gradients = [value.grad for value in self.parameters.values() if value.grad is not None]
        # [S]
        norm = (
            torch.stack([gradient.flatten(1).square().sum(1) for gradient in gradients])
            .sum(0)
            .sqrt()
        )
        most = self.settings.optimizer.gradient_clip
        scale = (most / (norm + 1e-6)).clamp(max=1.0) if most else torch.ones_like(norm)
        for gradient in gradients:
            gradient.mul_(scale.view(-1, *[1] * (gradient.dim() - 1)))

    def averaged(self, index: int) -> LIDiT:
        """One of the models, with its averaged weights."""
        model = copy.deepcopy(self.shape)
        weights = {
            name: value[index].clone()
            for name, value in zip(self.parameters, self.average, strict=True)
        }
        weights |= {name: value[index].clone() for name, value in self.buffers.items()}
        model.load_state_dict(weights, assign=True)
        return model.eval()


class StackedGroupNorm(nn.GroupNorm):
    """GroupNorm in operations that know stacks; torch's own looks at the memory's layout, which a
    stack has none of.
    """

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """[B, D, h, w] -> [B, D, h, w]."""
        # [B, groups, D / groups * h * w]
        grouped = image.unflatten(1, (self.num_groups, -1)).flatten(2)
        centred = grouped - grouped.mean(2, keepdim=True)
        scaled = centred * (centred.square().mean(2, keepdim=True) + self.eps).rsqrt()
        return scaled.reshape(image.shape) * self.weight[:, None, None] + self.bias[:, None, None]


def stackable(model: LIDiT) -> LIDiT:
    """A copy that can be called with stacked weights."""
    copied = copy.deepcopy(model)
    for part in copied.modules():
        if isinstance(part, nn.GroupNorm):
            part.__class__ = StackedGroupNorm
    return copied


def side_by_side(batches: Sequence[TrainingBatch]) -> States:
    """The captions of several batches, padded to one length, [S, B, T, W]; encoders by their place
    in their order.

    Stacks take models whose encoders differ in name alone, such as arms with and without an
    instruction.
    """
    found = {}
    for place in range(len(batches[0].text)):
        of_models = [batch.text[sorted(batch.text)[place]] for batch in batches]
        longest = max(states.states.shape[1] for states in of_models)
        padded = [states.pad_to(longest) for states in of_models]
        prefixes = [states.prefix for states in of_models]
        found[encoder_name(place)] = (
            torch.stack([states.states for states in padded]),
            torch.stack([states.mask for states in padded]),
            torch.stack(prefixes),
        )
    return found


def encoder_name(place: int) -> str:
    """What a stack's models call their encoders."""
    return f"encoder{place}"
