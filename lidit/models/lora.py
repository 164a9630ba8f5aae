"""LoRA adapters in a network that is trained (arXiv 2106.09685), by peft: thin matrices beside
frozen layers.
"""

from __future__ import annotations

from importlib.util import find_spec

from lidit.config.align import LoraSettings
from lidit.errors import InputError, one_line
from lidit.models.lidit import LIDiT

ADAPTER = "default"  # the name of the one adapter that is trained


def require_peft() -> None:
    """Raise InputError where peft is not installed."""
    if find_spec("peft") is None:
        raise InputError(
            "LoRA adapters need peft, which is not installed: pip install 'lidit-pipeline[lora]'"
        )


def add_lora(model: LIDiT, settings: LoraSettings) -> None:
    """Freeze a network and give its chosen layers an adapter that changes nothing yet; weights by
    torch's seed.

    Raises InputError where no layer's name matches, or peft is not installed.
    """
    require_peft()
    from peft import LoraConfig

    alpha = 2 * settings.rank if settings.alpha is None else settings.alpha
    config = LoraConfig(r=settings.rank, lora_alpha=alpha, target_modules=settings.targets)
    try:
        model.add_adapter(config, ADAPTER)
    except ValueError as error:  # no layer of that name, or one that takes no adapter
        raise InputError(f"lora.targets: {settings.targets!r}: {one_line(error, 200)}") from None


def merge_lora(model: LIDiT) -> None:
    """Add the adapter to the weights and forget it: the network is an ordinary one again."""
    model.fuse_lora()
    model.unload_lora()
    model.requires_grad_(True)
