"""What an ingest, an embedding or an encoding of images tells the tracker."""

from __future__ import annotations

from pathlib import Path

from lidit.config import CodecSettings, EncoderSettings, IngestSettings, TrackingSettings
from lidit.config.settings import flatten
from lidit.sources.ingest import IngestSummary
from lidit.store import Corpus
from pipelines.corpus.embed import EmbedSummary
from pipelines.corpus.latents import LatentsSummary
from pipelines.tracking.inputs import corpus_input, family_input
from pipelines.tracking.stages import Stage, track_stage


def track_ingest(
    corpus: str,
    settings: IngestSettings,
    made: IngestSummary,
    tracking: TrackingSettings | None = None,
    home: Path | None = None,
) -> None:
    """Samples, captions, what was refused, and how fast; nothing where the corpus
    was there before.
    """
    if made.skipped:
        return
    data = corpus_input(Corpus.open(corpus))
    numbers = {
        "samples": made.samples, "captions": made.captions, "refused": made.refused,
        "seconds": made.seconds,
        "samples_per_second": made.samples / max(made.seconds, 1e-9),
    }  # fmt: skip
    track_stage(
        Stage("ingest", data.name, data, None, flatten(settings, given_only=True), numbers),
        tracking,
        home,
    )


def track_embed(
    corpus: str,
    settings: EncoderSettings,
    made: EmbedSummary,
    tracking: TrackingSettings | None = None,
    home: Path | None = None,
) -> None:
    """Captions per second, padding's waste and bytes; nothing where the family was there before."""
    if not made.computed_units:
        return
    opened = Corpus.open(corpus)
    family = opened.text_family(made.directory)
    params = flatten(settings, given_only=True) | {
        "block": f"{family.spec['blocks']} of {family.spec['total_blocks']}",
        "instruction": family.spec["instruction"],
        "fingerprint": made.fingerprint,
    }
    numbers = {
        "captions": made.captions, "tokens": made.tokens, "truncated": made.truncated,
        "bytes": made.bytes,
        "padding_waste": made.padding_waste, "seconds": made.seconds,
        "computed_units": made.computed_units,
        "captions_per_second": made.captions * made.computed_units / made.units / max(made.seconds,
                                                                                      1e-9),
    }  # fmt: skip
    track_stage(
        Stage("embed", made.directory, family_input(family), corpus_input(opened), params, numbers),
        tracking,
        home,
    )


def track_latents(
    corpus: str,
    settings: CodecSettings,
    made: LatentsSummary,
    tracking: TrackingSettings | None = None,
    home: Path | None = None,
) -> None:
    """Images per second, the codec's share of the time and bytes; nothing where the family was
    there before.
    """
    if not made.computed_units:
        return
    opened = Corpus.open(corpus)
    numbers = {
        "images": made.images, "bytes": made.bytes, "seconds": made.seconds,
        "codec_busy": made.codec_busy,
        "images_per_second": made.images * made.computed_units / made.units / max(made.seconds,
                                                                                  1e-9),
    }  # fmt: skip
    data = family_input(opened.latent_family(made.directory))
    params = flatten(settings, given_only=True) | {"fingerprint": made.fingerprint}
    track_stage(
        Stage("latents", made.directory, data, corpus_input(opened), params, numbers),
        tracking,
        home,
    )
