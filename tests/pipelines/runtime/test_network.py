"""The probe of the network between processes, over gloo on this machine."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from jobs.doctor import network, network_finding
from lidit.errors import JobError
from pipelines.runtime.network import NetworkProbe, Reduction, timed_sum


@pytest.mark.slow  # starts a Ray
def test_two_processes_sum_up_and_doctor_says_how_fast(ray_cluster: None) -> None:
    finding = network()
    assert finding.state == "note"
    assert "gloo over 2 processes of one machine" in finding.found
    assert float(finding.found.split()[0]) > 0
    assert "no free GPU" in finding.remedy


def test_bandwidth_counts_what_passes_through_a_process() -> None:
    """The slowest process counts; four processes send 2 x 3/4 of the bytes each."""
    seen = [
        Reduction(f"node{i // 2}", "nccl", 1000, 0.5 if i else 1.0, 100 * i - 1, i)
        for i in range(4)
    ]
    probe = NetworkProbe.of(seen)
    assert (probe.processes, probe.nodes, probe.bandwidth) == (4, 2, 1500.0)
    assert (probe.least_locked, probe.least_adapters) == (99, 0)  # -1 is without limit


@pytest.mark.parametrize(
    ("probe", "state", "remedy"),
    [
        (NetworkProbe(8, 1, "nccl", 300e9, -1, 0), "ok", ""),
        (NetworkProbe(8, 1, "nccl", 20e9, -1, 0), "note", "topo -m"),
        (NetworkProbe(16, 2, "nccl", 40e9, -1, 8), "ok", ""),
        (NetworkProbe(16, 2, "nccl", 1e9, -1, 0), "bad", "infra/kuberay/rdma"),
        (NetworkProbe(16, 2, "nccl", 1e9, 65536, 8), "bad", "ulimit -l"),
        (NetworkProbe(16, 2, "nccl", 1e9, -1, 8), "bad", "NCCL_IB_HCA"),
        (NetworkProbe(1, 1, "nccl", 0.0, -1, 0), "note", "nothing was sent"),
    ],
)
def test_a_slow_network_is_told_with_what_to_do(
    probe: NetworkProbe, state: str, remedy: str
) -> None:
    finding = network_finding(probe, "found")
    assert finding.state == state
    assert remedy in finding.remedy
    assert bool(finding.remedy) == bool(remedy)


def test_a_wrong_sum_is_no_figure(tmp_path_factory: pytest.TempPathFactory) -> None:
    """A process that believes in another number of processes than there are."""
    store = tmp_path_factory.mktemp("store") / "store"
    dist.init_process_group("gloo", f"file://{store}", rank=0, world_size=1)
    try:
        assert timed_sum(torch.device("cpu"), 0, 1, 1) > 0
        with pytest.raises(JobError, match="the sum over all processes is wrong"):
            timed_sum(torch.device("cpu"), 0, 2, 1)
    finally:
        dist.destroy_process_group()
