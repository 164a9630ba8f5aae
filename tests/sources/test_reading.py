"""Images found again in their sources, without a corpus on disk."""

import hashlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pyarrow as pa
import pytest

from lidit.sources.reading import unit_images
from lidit.store import Corpus
from tests.helpers.pictures import encoded, picture, sample, write_tar


class _Corpus:
    """What reading asks of a corpus: one unit of one source file, images without an offset."""

    def __init__(self, path: Path, members: list[str]) -> None:
        content = path.read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        self.folder = path.parent
        self.sources = pa.table({"file": [path.name], "bytes": [len(content)], "sha256": [digest]})
        self.rows = [
            {
                "key": member,
                "image": {"file": path.name, "member": member, "offset": None, "size": None},
            }
            for member in members
        ]

    def samples(self, unit: int) -> Any:
        return SimpleNamespace(to_pylist=lambda: self.rows)

    def image_path(self, file: str) -> str:
        return f"{self.folder}/{file}"


@pytest.mark.parametrize("name", ["x.tar.gz", "X.TAR.GZ", "X.TGZ"])
def test_members_of_a_compressed_tar_are_found_again(tmp_path: Path, name: str) -> None:
    path = write_tar(tmp_path / name, [*sample("a", seed=1), *sample("b", seed=2)], "w:gz")
    found = list(unit_images(cast(Corpus, _Corpus(path, ["b.png", "a.png"])), 0))
    assert found == [encoded(picture(seed=2)), encoded(picture(seed=1))]
