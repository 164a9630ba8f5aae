"""The load of this machine, as MLflow's tab of system metrics names it."""

from __future__ import annotations

import logging
from typing import Any

from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

log = logging.getLogger(__name__)
SECTION = "system"


class MachineLoad:
    """CPU, memory, disk, network, and GPUs where NVIDIA's library is there; read whenever the
    caller logs.

    MLflow's own thread would send past our outbox: what it measures while the tracker is away is
    lost.
    """

    def __init__(self) -> None:
        self.monitors: list[Any] = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
        try:
            self.monitors.append(GPUMonitor())
        except (ImportError, RuntimeError) as error:
            log.debug("no metrics of GPUs: %s", error)

    def read(self) -> dict[str, float]:
        """The load since the last call."""
        values: dict[str, float] = {}
        for monitor in self.monitors:
            monitor.collect_metrics()
            values |= {
                f"{SECTION}/{name}": value for name, value in monitor.aggregate_metrics().items()
            }
            monitor.clear_metrics()
        return values
