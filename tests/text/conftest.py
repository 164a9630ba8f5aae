from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lidit.config import EncoderSettings
from tests.helpers.tiny_models import tiny_llm


@pytest.fixture(scope="session", autouse=True)
def _digests_of_passing_models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What is remembered about models that live for one test stays out of the user's cache."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lidit.text.specs.cache_folder", lambda: folder)
        yield


@pytest.fixture(scope="session")
def model_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The tiny model of a family, made once."""
    made: dict[str, Path] = {}

    def model(family: str) -> Path:
        if family not in made:
            made[family] = tiny_llm(tmp_path_factory.mktemp(family), family)
        return made[family]

    return model


@pytest.fixture
def settings() -> Callable[..., EncoderSettings]:
    def make(folder: Path, **changes: object) -> EncoderSettings:
        return EncoderSettings.model_validate({"name": "tiny", "model": str(folder)} | changes)

    return make
