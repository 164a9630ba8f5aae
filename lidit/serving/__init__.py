"""Requests drawn together, step by step, by one model on one device: a library, no cluster and no
network.

Each name is looked up when it is first used: what only keeps keys or an audit log loads no torch.
`__init__.pyi` says to type checkers what the names are.
"""

from importlib import import_module

_PLACES = {
    "Engine": "lidit.serving.engine",
    "PromptCache": "lidit.serving.prompts",
    "Request": "lidit.serving.request",
}
__all__ = ["Engine", "PromptCache", "Request"]


def __getattr__(name: str) -> object:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_PLACES[name]), name)
