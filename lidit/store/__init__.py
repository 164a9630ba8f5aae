"""The corpus on disk: what a platform team keeps, whatever model it trains later."""

from lidit.store.corpus import Corpus, publish_corpus, publish_root, publish_unit
from lidit.store.families import LatentFamily, TextFamily
from lidit.store.files.atomic import CRASH_POINTS, crash_point
from lidit.store.latent_file import Crop, latents_table
from lidit.store.loss import StorageLoss, storage_loss
from lidit.store.manifest import FamilyHandle, spec_differences
from lidit.store.records import CommitRecord, UnitStatistics
from lidit.store.samples import (
    ImageReference,
    Refusal,
    Sample,
    caption_digest,
    normalise,
    unit_tables,
)
from lidit.store.schema import canonical_json, digest_of
from lidit.store.shared import SharedStates, shared_table, with_empty_pooled
from lidit.store.states import channel_statistics, text_table, with_pooled
from lidit.store.writer import FamilyWriter

__all__ = [
    "CRASH_POINTS",
    "CommitRecord",
    "Corpus",
    "Crop",
    "FamilyHandle",
    "FamilyWriter",
    "ImageReference",
    "LatentFamily",
    "Refusal",
    "Sample",
    "SharedStates",
    "StorageLoss",
    "TextFamily",
    "UnitStatistics",
    "canonical_json",
    "caption_digest",
    "channel_statistics",
    "crash_point",
    "digest_of",
    "latents_table",
    "normalise",
    "publish_corpus",
    "publish_root",
    "publish_unit",
    "shared_table",
    "spec_differences",
    "storage_loss",
    "text_table",
    "unit_tables",
    "with_empty_pooled",
    "with_pooled",
]
