"""Requests drawn together, step by step, by one model on one device: a library, no cluster and no network."""

from lidit.serving.engine import Engine
from lidit.serving.prompts import PromptCache
from lidit.serving.request import Request

__all__ = ["Engine", "PromptCache", "Request"]
