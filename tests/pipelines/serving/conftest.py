"""One small platform for all tests of its API."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines.serving.settings import ServeSettings
from pipelines.serving.studio import studio_of
from tests.helpers.one_process import Platform, platform
from tests.helpers.served_model import small_model

FORBIDDEN = "gore"


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    root = tmp_path_factory.mktemp("served")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LIDIT_CACHE", str(root / "cache"))
        yield small_model(root)


def settings_for(model: Path, folder: Path, **changes: object) -> ServeSettings:
    """Guarded by a list of one word, and by a rule that no picture breaks."""
    folder.mkdir(parents=True, exist_ok=True)
    words = folder / "words.txt"
    words.write_text(f"{FORBIDDEN}\n")
    guards = {"words": str(words), "pixel_rule": {"colour": [255, 0, 0], "share": 1.0, "distance": 1.0}}
    tree = {"model": str(model), "folder": str(folder), "guards": guards, "limits": {"steps": 400}, "provenance": {"watermark": False}, **changes}
    return ServeSettings.model_validate(tree)


@pytest.fixture(scope="session")
def served(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    settings = settings_for(model, tmp_path_factory.mktemp("platform"))
    with platform(settings, studio_of(settings)) as running:
        yield running
