"""Requests drawn together by one model on one device, and what stands around that where strangers may ask: keys,
audit, guards, provenance. A library, no cluster and no network.

The names below are looked up when they are first used: a process that only checks keys loads no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

__all__ = ["Engine", "PromptCache", "Request"]
_PLACES = {"Engine": "engine", "PromptCache": "prompts", "Request": "request"}

if TYPE_CHECKING:
    from lidit.serving.engine import Engine
    from lidit.serving.prompts import PromptCache
    from lidit.serving.request import Request
else:

    def __getattr__(name: str) -> object:
        if name not in _PLACES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = globals()[name] = getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)
        return value
