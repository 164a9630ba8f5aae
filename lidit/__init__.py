"""LI-DiT for Python: captions to LLM states, a corpus of them on disk, and the model trained on it.

Importing `lidit` loads no library. Each name below is looked up when it is first used;
`lidit.train` is the only one that needs Ray. docs/api.md describes them.
"""

from importlib import import_module
from typing import TYPE_CHECKING

# name -> the module and the attribute it stands for
_PLACES = {
    "Corpus": "lidit.store:Corpus",
    "DataSettings": "lidit.config:DataSettings",
    "EncoderSettings": "lidit.config:EncoderSettings",
    "FeedDataset": "lidit.data.feed:FeedDataset",
    "InputError": "lidit.errors:InputError",
    "JobError": "lidit.errors:JobError",
    "LIDiT": "lidit.models:LIDiT",
    "LIDiTPipeline": "lidit.pipeline:LIDiTPipeline",
    "Recipe": "lidit.config:Recipe",
    "StorageError": "lidit.errors:StorageError",
    "TextStates": "lidit.models:TextStates",
    "export_corpus": "lidit.store.export:export_corpus",
    "load_encoder": "lidit.text:load_encoder",
    "load_recipe": "lidit.config.shipped:load_recipe",
    "open_feed": "lidit.data.feed:open_feed",
    "train": "pipelines.training.train:train",
    "verify_corpus": "lidit.store.verify:verify_corpus",
}
__all__ = [
    "Corpus",
    "DataSettings",
    "EncoderSettings",
    "FeedDataset",
    "InputError",
    "JobError",
    "LIDiT",
    "LIDiTPipeline",
    "Recipe",
    "StorageError",
    "TextStates",
    "__version__",
    "export_corpus",
    "load_encoder",
    "load_recipe",
    "open_feed",
    "train",
    "verify_corpus",
]

if TYPE_CHECKING:  # what type checkers and editors see in place of the table
    from lidit.config import DataSettings, EncoderSettings, Recipe
    from lidit.config.shipped import load_recipe
    from lidit.data.feed import FeedDataset, open_feed
    from lidit.errors import InputError, JobError, StorageError
    from lidit.models import LIDiT, TextStates
    from lidit.pipeline import LIDiTPipeline
    from lidit.store import Corpus
    from lidit.store.export import export_corpus
    from lidit.store.verify import verify_corpus
    from lidit.text import load_encoder
    from pipelines.training.train import train

    __version__: str
else:

    def __getattr__(name: str) -> object:
        """Find a name of the table, or the version, and keep it: every later access is an ordinary
        one.
        """
        if name == "__version__":
            value = _version()
        elif name in _PLACES:
            module, _, attribute = _PLACES[name].partition(":")
            value = getattr(import_module(module), attribute)
        else:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _version() -> str:
    """The installed version; in a checkout that was never installed, "0+source"."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("lidit-pipeline")
    except PackageNotFoundError:
        return "0+source"
