"""What is accepted: captions, keys and images judged against the ingest settings, each refusal with
its reason.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from lidit.config import IngestSettings
from lidit.config.fields import text_problem
from lidit.images import BadImageError, Buckets, decode_image
from lidit.sources.base import ORIGINAL, RawSample, shown
from lidit.store import ImageReference, Refusal, Sample, normalise
from lidit.store.samples import printable
from lidit.store.schema import canonical_json

_URL = re.compile(r"https?://|www\.\w", re.IGNORECASE)
_AESTHETIC_FIELDS = (
    "aesthetic",
    "aesthetic_score",
    "aesthetics",
    "AESTHETIC_SCORE",
    "score_aesthetic",
)
_TAGS_FROM = 5
_WORDS_PER_TAG = 2.5
_FOUND_SHOWN = 10


class SampleChecker:
    """Turns raw samples into accepted ones. Pure: the outcome depends on the sample and the
    settings alone.
    """

    def __init__(self, settings: IngestSettings, class_names: Mapping[str, str]) -> None:
        self.settings, self.class_names = settings, class_names
        self.buckets = Buckets(settings.resolution, settings.bucket_multiple, settings.max_aspect)

    def check(
        self, raw: RawSample, file: str, has_images: bool
    ) -> tuple[Sample | None, list[Refusal]]:
        """The accepted sample or None, and refusals of the sample or of single captions of it."""
        key = printable(raw.key)

        def refused(reason: str) -> tuple[None, list[Refusal]]:
            return None, [Refusal(key, file, reason)]

        if problem := _key_problem(raw.key) or _reference_problem(raw.reference):
            return refused(problem)
        if problem := self._aesthetic_problem(raw.meta):
            return refused(problem)
        kept, bad = self._captions(raw)
        if not kept:
            return refused(bad[0] if bad else self._no_caption(raw))
        refusals = [Refusal(key, file, reason, "caption") for reason in bad]
        meta = dict(raw.meta)
        if not has_images:
            return Sample(key, tuple(kept), meta=_json(meta)), refusals
        if raw.image is None:
            return refused(f"no image: no member or field holds one{_found(raw)}")
        try:
            decoded = decode_image(raw.image, self.settings.max_pixels)
        except BadImageError as error:
            return refused(str(error))
        width, height = decoded.image.size
        if min(width, height) < self.settings.min_side:
            return refused(f"image too small: {width}x{height}, min_side={self.settings.min_side}")
        if decoded.notes:
            meta["image_notes"] = list(decoded.notes)
        bucket = str(self.buckets.closest(width, height))
        return Sample(key, tuple(kept), raw.reference, width, height, bucket, _json(meta)), refusals

    def _aesthetic_problem(self, meta: Mapping[str, Any]) -> str | None:
        least = self.settings.min_aesthetic
        if least is None:
            return None
        for name in _AESTHETIC_FIELDS:
            value = meta.get(name)
            try:
                score = float(value) if isinstance(value, int | float | str) else None
            except (ValueError, OverflowError):
                score = None
            if score is not None and score == score:
                return (
                    None
                    if score >= least
                    else f"aesthetic score too low: {score:g}, min_aesthetic={least:g}"
                )
        return (
            f"no aesthetic score: min_aesthetic={least:g} needs one of "
            f"{', '.join(_AESTHETIC_FIELDS)}"
        )

    def _captions(self, raw: RawSample) -> tuple[list[tuple[str, str]], list[str]]:
        """Good captions, distinct, and the reasons of the others."""
        wanted = list(raw.captions)
        if self.settings.class_template is not None and raw.label is not None:
            name = self.class_names.get(raw.label, None if self.class_names else raw.label)
            if name is None:
                return [], [
                    f"unknown class: {printable(raw.label)!r} is not in {self.settings.class_names}"
                ]
            wanted.append((self.settings.class_template.replace("{class}", name), ORIGINAL))
        kept: dict[str, str] = {}
        bad = []
        for text, origin in wanted:
            stripped = text.strip()
            if problem := self._caption_problem(stripped):
                bad.append(problem)
            else:
                kept.setdefault(normalise(stripped), printable(origin))
        return list(kept.items()), bad

    def _no_caption(self, raw: RawSample) -> str:
        others = [
            name for name in self.settings.caption_fields if raw.meta.get(name) not in (None, "")
        ]
        reason = f"no caption: no text member, caption field or class label{_found(raw)}"
        if others:
            return f"{reason}; {others[0]} is no text but {type(raw.meta[others[0]]).__name__}"
        if raw.label is not None and self.settings.class_template is None:
            return (
                f"{reason}; class_template makes a caption of the class label {shown(raw.label)!r}"
            )
        return reason

    def _caption_problem(self, text: str) -> str | None:
        settings = self.settings
        if problem := text_problem(text, "caption"):
            return problem
        if len(text) < settings.min_caption_chars:
            return (
                f"caption too short: {len(text)} characters, "
                f"min_caption_chars={settings.min_caption_chars}"
            )
        if len(text) > settings.max_caption_chars:
            return (
                f"caption too long: {len(text)} characters, "
                f"max_caption_chars={settings.max_caption_chars}"
            )
        if settings.refuse_url_captions and _URL.search(text):
            return "caption with URL: refuse_url_captions is set"
        if settings.refuse_tag_captions and is_tag_list(text):
            return "caption is a tag list: refuse_tag_captions is set"
        return None


def _found(raw: RawSample) -> str:
    """What was there instead of what was looked for."""
    fields = [shown(name) for name in raw.meta][:_FOUND_SHOWN]
    found = [*raw.found[:_FOUND_SHOWN], *([f"fields {', '.join(fields)}"] if fields else [])]
    return f"; found {', '.join(found)}" if found else ""


def is_tag_list(text: str) -> bool:
    """Five or more parts between commas, 2.5 words each or fewer on average, no sentence end: "cat,
    red, cute, ...".
    """
    parts = [part.split() for part in re.split(r"[,;|，、]", text) if part.strip()]
    ends = text.rstrip()[-1:] in (".", "!", "?", "。")
    return (
        len(parts) >= _TAGS_FROM
        and not ends
        and sum(map(len, parts)) <= _WORDS_PER_TAG * len(parts)
    )


def _key_problem(key: str) -> str | None:
    if not key.strip() or "\0" in key:
        return "unsafe name: empty, or with a NUL byte"
    if not _encodable(key):
        return "invalid UTF-8: the key holds bytes that are no text"
    if key.startswith("/") or ".." in key.split("/"):
        return "unsafe name: the key leaves its folder"
    return None


def _reference_problem(reference: ImageReference | None) -> str | None:
    if reference is None or _encodable(reference.file + reference.member):
        return None
    return "invalid UTF-8: the image's name holds bytes that are no text"


def _encodable(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _json(meta: dict[str, Any]) -> str:
    try:
        text = canonical_json(meta)
    except (TypeError, ValueError):
        # values of table columns that JSON does not know, such as dates
        text = canonical_json({name: _plain(value) for name, value in meta.items()})
    return printable(text)


def _plain(value: Any) -> Any:
    try:
        canonical_json(value)
    except (TypeError, ValueError):
        return str(value)
    return value
