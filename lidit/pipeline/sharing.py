"""A pipeline's way to a folder and to the hub, with the card that says what it is."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
from huggingface_hub import create_repo

from lidit.codecs import AutoencoderCodec, load_codec
from lidit.config import SamplerSettings
from lidit.config.settings import validate
from lidit.errors import InputError
from lidit.pipeline.card import model_card
from lidit.pipeline.checksums import write_checksums
from lidit.pipeline.components import ENCODERS, INDEX, VAE, PipelineParts
from lidit.pipeline.places import LOADER, LOADER_TEXT
from lidit.pipeline.settings import PipelineSettings

CARD = "README.md"


class ShareableParts(PipelineParts):
    """The parts of a pipeline, written as one folder."""

    def save_pretrained(
        self,
        save_directory: str | Path,
        max_shard_size: str = "5GB",
        variant: str | None = None,
        safe_serialization: bool = True,
    ) -> None:
        """Write the folder that `from_pretrained` reads, without the model card.

        Args:
            save_directory: The folder; files of an earlier save are replaced.
            max_shard_size: Largest safetensors file of the network.
            variant: Name of this set of the network's weights beside others, such as "bf16".
            safe_serialization: Always true: weights are safetensors, never pickles.
        """
        if not safe_serialization:
            raise InputError(
                "safe_serialization=False would write pickles, which can run code; leave it out"
            )
        self.require_no_adapters()
        folder = Path(save_directory)
        if self.codec_settings.model is not None:
            exact = load_codec(self.found_codec.model_copy(update={"dtype": "float32"}))
            assert isinstance(exact, AutoencoderCodec)
            exact.model.save_pretrained(folder / VAE, safe_serialization=True)
            inside = self.codec_settings.model_copy(update={"model": VAE, "revision": None})
            self.register_to_config(codec=inside.model_dump(mode="json"))
        # diffusers would leave the index of a save in shards, and could not load what is saved
        # whole over it.
        kind = f".{variant}" if variant else ""
        (folder / "model" / f"{SAFETENSORS_WEIGHTS_NAME}.index{kind}.json").unlink(missing_ok=True)
        super().save_pretrained(
            str(folder), safe_serialization=True, max_shard_size=max_shard_size, variant=variant
        )
        for encoder in self.encoders.values():
            encoder.save(folder / ENCODERS)
        (folder / LOADER).write_text(LOADER_TEXT)
        write_checksums(folder)

    def push_to_hub(
        self,
        repo_id: str,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        create_pr: bool = False,
        variant: str | None = None,
    ) -> str:
        """Upload the model folder with its card to the hub.

        Args:
            repo_id: OWNER/MODEL; it is made where there is none.
            commit_message: Of the upload.
            private: Whether a new repository is private; None takes the owner's default.
            token: Of the hub; None takes the one of this machine's login.
            create_pr: Ask for a merge instead of committing.
            variant: See `save_pretrained`.

        Returns:
            The address of the commit.
        """
        own = None if self._folder is None else self._folder / CARD
        repo_id = create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, variant=variant)
            # Its own card: diffusers would put an empty one in its place.
            text = own.read_text("utf-8") if own is not None and own.is_file() else self.card({})
            (Path(folder) / CARD).write_text(text, encoding="utf-8")
            return str(self._upload_folder(folder, repo_id, token, commit_message, create_pr))

    def card(self, facts: Mapping[str, Any]) -> str:
        """The model card: Markdown with the front matter that the hub reads.

        Args:
            facts: What the card says of the training; see `save_pipeline`.

        Returns:
            The text of README.md.
        """
        saved = validate(SamplerSettings, self.config.sampler or {}, f"{INDEX}: sampler")
        settings = PipelineSettings(
            self.objective.settings,
            saved,
            self.codec_settings,
            self.config.height,
            self.config.width,
        )
        return model_card(self.model, list(self.encoders.values()), settings, facts)
