"""GPU processes take attention kernels that are not planned anew for every caption length."""

from collections.abc import Iterator

import pytest
import torch

from pipelines.runtime.kernels import avoid_plan_building


@pytest.fixture
def as_it_was() -> Iterator[None]:
    before = torch.backends.cuda.cudnn_sdp_enabled()
    yield
    torch.backends.cuda.enable_cudnn_sdp(before)


def test_cudnn_builds_no_plans_and_the_other_kernels_stay(as_it_was: None) -> None:
    torch.backends.cuda.enable_cudnn_sdp(True)
    avoid_plan_building()
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert torch.backends.cuda.mem_efficient_sdp_enabled()
    assert torch.backends.cuda.flash_sdp_enabled()
