"""The scene data set as WebDataset shards, a pure function of its arguments."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from PIL import Image

from lidit.datasets.scenes.captions import CaptionStyles, default_styles
from lidit.datasets.scenes.generator import (
    GENERATOR_VERSION,
    SMALLEST_SIDE,
    Split,
    generate_scene,
    seeded_random,
)
from lidit.datasets.scenes.scene import FREE_TAGS, Scene, check_tag
from lidit.datasets.scenes.shapes import vocabulary_for
from lidit.errors import InputError
from lidit.progress import SILENT, Progress

SUMMARY_FILE = "scenes.json"
SIMPLE_WEIGHTS = {
    "single_object": 1.0,
    "colors": 2.0,
    "two_object": 1.0,
    "position": 2.0,
    "color_attr": 3.0,
    "color_attr_position": 3.0,
}
FREE_WEIGHTS = dict.fromkeys(FREE_TAGS, 1.0)


@dataclass(frozen=True)
class SceneShards:
    """What `write_scene_shards` wrote, or found complete (`skipped`)."""

    out: Path
    shards: tuple[Path, ...]
    scenes: int
    captions: int
    distinct_captions: int
    bytes: int
    skipped: bool


@dataclass(frozen=True)
class SceneSet:
    """A set of scenes: everything that determines its shards' bytes.

    size: image side in pixels; per_shard: scenes in one tar; categories: category -> weight, by
    default those of the layout; styles: what captions are made of, by default the layout's; split:
    "train" (no held-out pair) or "unseen" (every scene shows a held-out pair).
    """

    count: int
    size: int
    seed: int
    layout: str = "simple"
    per_shard: int = 1000
    categories: Mapping[str, float] | None = None
    styles: CaptionStyles | None = None
    split: Split = "train"
    version: int = field(default=GENERATOR_VERSION, init=False)

    @property
    def shards(self) -> int:
        """The number of tars."""
        return -(-self.count // self.per_shard)

    @property
    def weights(self) -> dict[str, float]:
        """Category -> weight."""
        if self.categories is not None:
            return dict(self.categories)
        return SIMPLE_WEIGHTS if self.layout == "simple" else FREE_WEIGHTS

    @property
    def caption_styles(self) -> CaptionStyles:
        """What captions are made of."""
        return self.styles or default_styles(self.layout)

    def check(self) -> None:
        """Raises InputError for values out of range."""
        vocabulary_for(self.size, self.layout)
        for name, value, least in (
            ("count", self.count, 1),
            ("size", self.size, SMALLEST_SIDE[self.layout]),
            ("seed", self.seed, 0),
            ("per_shard", self.per_shard, 1),
        ):
            if value < least:
                raise InputError(
                    f"{name}={value}: must be at least {least} (layout {self.layout!r})"
                )
        if self.split not in ("train", "unseen"):
            raise InputError(f"split {self.split!r}: choose 'train' or 'unseen'")
        for tag in self.weights:
            check_tag(tag, self.layout)
        if (
            any(weight < 0 for weight in self.weights.values())
            or not sum(self.weights.values()) > 0
        ):
            raise InputError(
                f"category weights {self.weights}: none may be negative and one must be positive"
            )

    def record(self) -> dict[str, Any]:
        """As it stands in scenes.json, defaults written out."""
        written_out = dataclasses.replace(self, categories=self.weights, styles=self.caption_styles)
        return dataclasses.asdict(written_out)

    def scenes(self, shard: int) -> Iterator[tuple[int, Scene, Random]]:
        """(index, scene, random numbers for its captions) of every scene of a shard."""
        vocabulary = vocabulary_for(self.size, self.layout)
        names, weights = list(self.weights), list(self.weights.values())
        for index in range(shard * self.per_shard, min(self.count, (shard + 1) * self.per_shard)):
            # A generator per scene, so a shard can be written alone and a longer set begins with a
            # shorter one.
            rng = seeded_random("scene", self.layout, self.size, self.seed, self.split, index)
            tag = rng.choices(names, weights)[0]
            yield (
                index,
                generate_scene(rng, tag, self.size, self.layout, vocabulary, self.split),
                rng,
            )


def write_scene_shards(out: Path, scenes: SceneSet, progress: Progress = SILENT) -> SceneShards:
    """Render the scenes into WebDataset tars `scenes-00000.tar`, ... under `out`.

    A sample is KEY.png, KEY.txt (its first caption) and KEY.json with `captions`
    ([{text, origin, style}]), `geneval` (the metadata record), `split`, `tag` and `objects`.

    The same set gives the same pixels everywhere, and the same bytes with the same Pillow build. A
    folder that is complete is left as it is; an interrupted one is continued at its first missing
    shard. Raises InputError for values out of range and for a folder that holds anything else.
    """
    scenes.check()
    out = Path(out)
    finished = _existing(out, scenes)
    if finished is not None:
        return finished
    out.mkdir(parents=True, exist_ok=True)
    progress.expect(scenes.count)

    # The set is named before its first shard, so that another set is refused in a folder that is
    # half full.
    _write_json(out / SUMMARY_FILE, {"plan": scenes.record(), "complete": False})
    records, texts, captions = [], set(), 0
    for shard in range(scenes.shards):
        path = out / f"scenes-{shard:05d}.tar"
        shard_texts = _write_shard(path, scenes, shard) if not path.exists() else _texts_of(path)
        captions += len(shard_texts)
        texts.update(shard_texts)
        records.append({"file": path.name, "bytes": path.stat().st_size, "sha256": _sha256(path)})
        progress.update(min(scenes.count, (shard + 1) * scenes.per_shard))

    totals = {"scenes": scenes.count, "captions": captions, "distinct_captions": len(texts)}
    _write_json(
        out / SUMMARY_FILE, {"plan": scenes.record(), "complete": True, "shards": records, **totals}
    )
    return _summary(out, {"shards": records, **totals}, skipped=False)


def _existing(out: Path, scenes: SceneSet) -> SceneShards | None:
    """The finished set in `out`, None where it may be written. Raises InputError where `out` holds
    anything else.
    """
    if not out.exists():
        return None
    if not out.is_dir():
        raise InputError(f"{out}: is a file; give a new or empty folder for the scenes")
    if not any(out.iterdir()):
        return None
    try:
        summary = json.loads((out / SUMMARY_FILE).read_text(encoding="utf-8"))
        existing = summary["plan"]
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(
            f"{out}: not empty and not a scene set of ours; give a new or empty folder"
        ) from None
    record = json.loads(json.dumps(scenes.record()))
    if existing != record:
        differing = [key for key in record if existing.get(key) != record[key]]
        raise InputError(
            f"{out}: holds scenes made with other {', '.join(differing)}; give a new folder"
        )
    if not summary["complete"]:
        return None
    for shard in summary["shards"]:
        path = out / shard["file"]
        if not path.is_file() or _sha256(path) != shard["sha256"]:
            raise InputError(
                f"{path}: missing or changed since it was written; delete {out} and run again"
            )
    return _summary(out, summary, skipped=True)


def _summary(out: Path, record: dict[str, Any], skipped: bool) -> SceneShards:
    return SceneShards(
        out=out,
        shards=tuple(out / shard["file"] for shard in record["shards"]),
        scenes=record["scenes"],
        captions=record["captions"],
        distinct_captions=record["distinct_captions"],
        bytes=sum(shard["bytes"] for shard in record["shards"]),
        skipped=skipped,
    )


def _write_shard(path: Path, scenes: SceneSet, shard: int) -> list[str]:
    """Writes one tar under a temporary name, then renames it, so a shard is whole or absent.
    Returns all captions.
    """
    texts = []
    partial = path.with_suffix(".partial")
    with tarfile.open(partial, "w", format=tarfile.USTAR_FORMAT) as tar:
        for index, scene, rng in scenes.scenes(shard):
            captions = scenes.caption_styles.captions(scene, rng)
            texts += [caption.text for caption in captions]
            record = {
                "tag": scene.tag,
                "split": scenes.split,
                "captions": [dataclasses.asdict(caption) for caption in captions],
                "geneval": scene.geneval(captions[0].text),
                "objects": [dataclasses.asdict(item) for item in scene.objects],
            }
            key = f"{index:08d}"
            _add(tar, f"{key}.png", _png(scene))
            _add(tar, f"{key}.txt", captions[0].text.encode())
            _add(tar, f"{key}.json", json.dumps(record, sort_keys=True).encode())
    partial.replace(path)
    return texts


def _texts_of(path: Path) -> list[str]:
    texts = []
    with tarfile.open(path) as tar:
        for member in tar:
            content = tar.extractfile(member) if member.name.endswith(".json") else None
            if content is not None:
                texts += [caption["text"] for caption in json.load(content)["captions"]]
    return texts


def _png(scene: Scene) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(scene.render()).save(buffer, format="PNG", compress_level=6, optimize=False)
    return buffer.getvalue()


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    """A member whose header holds nothing but its name and size: TarInfo's time, owner and mode are
    constants.
    """
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_json(path: Path, content: dict[str, Any]) -> None:
    partial = path.with_suffix(".json.partial")
    partial.write_text(json.dumps(content, indent=1), encoding="utf-8")
    partial.replace(path)
