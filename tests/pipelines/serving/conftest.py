"""One small platform for all tests of its API."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines.serving.studio import studio_of
from tests.helpers.one_process import Platform, platform, settings_for
from tests.helpers.served_model import small_model


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    root = tmp_path_factory.mktemp("served")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LIDIT_CACHE", str(root / "cache"))
        yield small_model(root)


@pytest.fixture(scope="session")
def served(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    settings = settings_for(model, tmp_path_factory.mktemp("platform"))
    with platform(settings, studio_of(settings)) as running:
        yield running
