"""What a run reads, as MLflow's data sets: the corpus and each family, with schema and profile."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from mlflow.types import Schema, TensorSpec

from lidit.store import Corpus, LatentFamily, TextFamily

DIGEST_LENGTH = 36  # of MLflow's column
CORPUS_COLUMNS = ("key", "caption")


@dataclass(frozen=True)
class InputData:
    """A data set as MLflow keeps it. digest: of the content."""

    name: str
    digest: str
    source: str
    schema: Mapping[str, Any]
    profile: Mapping[str, Any]

    @property
    def source_type(self) -> str:
        scheme = urlsplit(self.source).scheme
        return scheme if len(scheme) > 1 else "local"  # one letter is a drive


def corpus_input(corpus: Corpus) -> InputData:
    """The corpus: captions and keys, how many, how many distinct."""
    totals = corpus.facts["totals"]
    columns = [{"name": name, "type": "string", "required": True} for name in CORPUS_COLUMNS]
    profile = {"num_rows": corpus.num_samples, "units": corpus.num_units, **totals}
    location = corpus.folder.location
    return InputData(
        location.rstrip("/").rsplit("/", 1)[-1],
        corpus.digest,
        location,
        {"mlflow_colspec": columns},
        profile,
    )


def family_input(family: TextFamily | LatentFamily) -> InputData:
    """A family: the shape of one entry, how many there are, their bytes."""
    if isinstance(family, TextFamily):
        name, shape = "states", [-1, family.width]
    else:  # sizes differ from bucket to bucket
        name, shape = "latents", [family.shapes(0)[0][0], -1, -1]
    features = Schema([TensorSpec(np.dtype("float32"), tuple(shape), name)])
    counted = ("rows", "units", "tokens", "bytes")
    profile = {name: family.manifest[name] for name in counted if name in family.manifest}
    schema = {"mlflow_tensorspec": {"features": features.to_json(), "targets": None}}
    return InputData(family.directory, family.digest, family.folder.location, schema, profile)
