"""MFU counts what the model needs: three forward passes a step, a multiply-add as two FLOPs."""

import torch
from torch import nn

from pipelines.training.mfu import peak_flops, step_flops, utilisation


def test_a_step_is_three_forward_passes_of_every_sample() -> None:
    linear, one = nn.Linear(8, 16), torch.zeros(1, 5, 8)
    assert step_flops(lambda: linear(one), samples=4) == 3 * 4 * 2 * 5 * 8 * 16


def test_a_gpu_is_known_by_the_name_it_gives() -> None:
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("NVIDIA A100-SXM4-80GB") == 312e12
    assert peak_flops("Some other accelerator") is None


def test_a_processor_has_no_utilisation() -> None:
    assert utilisation(1e12, 1.0, torch.device("cpu")) is None
