"""What a model is trained on: a corpus's latents, and one family of text states per encoder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lidit.config import DataSettings
from lidit.errors import InputError
from lidit.store import Corpus, LatentFamily, TextFamily
from lidit.store.family import OPEN_FILES
from lidit.store.rolling import RollingTextFamily


@dataclass(frozen=True)
class Families:
    """`texts`: encoder name -> its text family."""

    latents: LatentFamily
    texts: Mapping[str, TextFamily]

    @classmethod
    def open(
        cls,
        corpus: Corpus,
        settings: DataSettings,
        latents: str | None = None,
        texts: Mapping[str, str] | None = None,
    ) -> Families:
        """Open families for reading in training order.

        latents: name, directory or fingerprint; default: the corpus's only family of latents.
        texts: encoder name -> name, directory or fingerprint; default: every text family under its
        own name. Raises InputError for a family that is missing, unfinished or ambiguous.
        """
        if texts is None:
            texts = {handle.name: handle.name for handle in corpus.text_families()}
        if not texts:
            raise InputError(
                f"{corpus.folder.location}: the corpus has no text family; make one with: "
                "lidit embed"
            )
        # A batch at a window's border reads from both windows.
        keep_open = max(OPEN_FILES, 2 * settings.window_units)
        return cls(
            corpus.latent_family(latents or _only_latents(corpus), keep_open),
            {
                name: corpus.text_family(wanted, keep_open, rolling=True)
                for name, wanted in texts.items()
            },
        )

    @property
    def rolling(self) -> list[RollingTextFamily]:
        """Those whose units are computed while they are read."""
        return [family for family in self.texts.values() if isinstance(family, RollingTextFamily)]

    def stop_waiting(self, stop: bool = True) -> None:
        """Let nobody wait for a unit of a rolling family any longer; `stop=False` takes it back."""
        for family in self.rolling:
            family.stop_waiting(stop)

    @property
    def widths(self) -> dict[str, int]:
        """Encoder name -> width of its states."""
        return {name: family.width for name, family in self.texts.items()}

    @property
    def stored_layers(self) -> dict[str, int]:
        """Encoder name -> how many layers of a token its states keep apart."""
        return stored_layers(self.texts)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of the corpus's first latent."""
        return self.latents.shapes(0)[0]


def stored_layers(texts: Mapping[str, TextFamily]) -> dict[str, int]:
    """How many layers of a token each family keeps apart, which a model averages; others hold one
    state per token.
    """
    return {
        name: len(family.spec.get("layers", (0,))) if family.spec.get("join") == "separate" else 1
        for name, family in texts.items()
    }


def _only_latents(corpus: Corpus) -> str:
    directories = [handle.directory for handle in corpus.latent_families()]
    if len(directories) != 1:
        listed = ", ".join(directories) or "none; make them with: lidit latents"
        raise InputError(
            f"{corpus.folder.location}: name one family of latents; the corpus has: {listed}"
        )
    return directories[0]
