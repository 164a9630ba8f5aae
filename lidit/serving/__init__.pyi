from lidit.serving.engine import Engine as Engine
from lidit.serving.prompts import PromptCache as PromptCache
from lidit.serving.request import Request as Request

__all__ = ["Engine", "PromptCache", "Request"]
