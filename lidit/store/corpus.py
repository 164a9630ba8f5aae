"""A corpus: all units of one ingest, and the families computed over them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa

from lidit.errors import InputError, no_corpus
from lidit.store.families import LatentFamily, TextFamily
from lidit.store.family import OPEN_FILES
from lidit.store.files.atomic import publish_bytes, publish_table
from lidit.store.files.folder import Folder, is_url
from lidit.store.manifest import (
    FAMILY_FILE,
    MANIFEST_FILE,
    ROLLING_FILE,
    FamilyHandle,
    named,
    read_named_table,
    spec_differences,
)
from lidit.store.rolling import RollingTextFamily
from lidit.store.schema import FORMAT_VERSION, UNITS, digest_of, seal, unit_name, unseal

CORPUS_FILE = "corpus.json"
# What ingest wrote is never repaired: the families lie beside it and are valid for the same
# contents only.
INGEST_ANEW = "ingest the same sources into a new folder, then move text/ and latents/ over"


class Corpus:
    """A corpus on disk, to read: units of samples and captions, and the families computed over
    them.

    Open with `Corpus.open`. Row numbers are references: row r of a text family belongs to row r of
    the same unit's captions, row r of a latents family to row r of its samples.
    `folder` says where it is, `facts` is corpus.json, `digest` the identity of its contents.
    """

    def __init__(self, folder: Folder, facts: dict[str, Any]) -> None:
        self.folder = folder
        self.facts = facts
        self.digest: str = facts["digest"]
        self.digits: int = facts["unit_digits"]
        self.root: str = facts["root"]
        # unit files whose bytes were found to be those that ingest wrote
        self._sound: set[str] = set()

    @classmethod
    def open(cls, path: str | os.PathLike[str] | Folder) -> Corpus:
        """Open a corpus that ingest finished.

        Args:
            path: A local folder, or a URL that fsspec reads, such as s3://bucket/corpus.

        Returns:
            The corpus. Tables and families are read when they are asked for.

        Raises:
            InputError: No finished corpus at `path`, a damaged corpus.json, or another format
                version.
            StorageError: The object store cannot be used.
        """
        folder = Folder.at(path)
        try:
            facts = unseal(folder.read_bytes(CORPUS_FILE))
        except (FileNotFoundError, NotADirectoryError):
            exists = folder.exists()
            # An object store has no empty folders; a file is no place for a corpus, too.
            empty = folder.local and folder.path.is_dir() and not any(folder.path.iterdir())
            raise no_corpus(folder.location, exists, used=exists and not empty) from None
        except (ValueError, IsADirectoryError):
            raise InputError(f"{folder.location}/{CORPUS_FILE}: damaged; {INGEST_ANEW}") from None
        version = facts.get("format")
        if version != FORMAT_VERSION:
            raise InputError(
                f"{folder.location}/{CORPUS_FILE}: format version {version}, this release reads "
                f"{FORMAT_VERSION}"
            )
        return cls(folder, facts)

    @cached_property
    def units(self) -> pa.Table:
        """One row per unit: unit, source, samples, captions, and bytes and sha256 of the unit's two
        files.
        """
        return read_named_table(self.folder, self.facts["units"])

    @cached_property
    def sources(self) -> pa.Table:
        """One row per source file: file, bytes, sha256, samples, refused; quarantine file, its
        bytes and sha256.
        """
        return read_named_table(self.folder, self.facts["sources"])

    @property
    def num_units(self) -> int:
        """Units, numbered from 0."""
        return int(self.facts["totals"]["units"])

    @property
    def num_samples(self) -> int:
        """Samples of all units."""
        return int(self.facts["totals"]["samples"])

    def unit_name(self, unit: int) -> str:
        """The unit's number as its files write it.

        Args:
            unit: Number of the unit, from 0.

        Returns:
            Such as "00000".
        """
        return unit_name(unit, self.digits)

    def samples(self, unit: int) -> pa.Table:
        """Read the samples of one unit.

        Args:
            unit: Number of the unit, from 0.

        Returns:
            A table with key, captions (rows of the unit's captions, and their origin), image (file,
            member, offset, size in bytes), width and height in pixels, bucket "WxH" and meta
            (JSON).

        Raises:
            InputError: No such unit, or its file is missing or damaged.
        """
        return self._unit_table("samples", unit)

    def captions(self, unit: int) -> pa.Table:
        """Read the distinct captions of one unit.

        Args:
            unit: Number of the unit, from 0.

        Returns:
            A table with text and sha256.

        Raises:
            InputError: No such unit, or its file is missing or damaged.
        """
        return self._unit_table("captions", unit)

    def quarantine(self) -> Iterator[pa.Table]:
        """Read what ingest refused.

        Returns:
            One table per source file with refusals: key, file, reason, and what was refused
                (sample, caption, file).
        """
        folder = self.folder.child("quarantine")
        for name in sorted(folder.sizes()):
            if name.endswith(".arrow"):
                yield folder.read_table(name)

    def _unit_table(self, group: str, unit: int) -> pa.Table:
        if not 0 <= unit < self.num_units:
            raise InputError(
                f"{self.folder.location}: no unit {unit}; there are {self.num_units}, from 0"
            )
        name = f"{group}/{self.unit_name(unit)}.arrow"
        where, remedy = self.folder.where(name), f"run lidit verify; {INGEST_ANEW}"
        try:
            content = self.folder.map(name)
        except FileNotFoundError:
            raise InputError(f"{where}: missing; {INGEST_ANEW}") from None
        except IsADirectoryError:
            raise InputError(f"{where}: is a folder, not a file; {INGEST_ANEW}") from None
        # A changed caption would get states, and every later check would find these sound.
        if name not in self._sound:
            if hashlib.sha256(content).hexdigest() != self.digest_of_unit(group, unit):
                raise InputError(
                    f"{where}: damaged (its bytes are not those that ingest wrote); {remedy}"
                )
            self._sound.add(name)
        return pa.ipc.open_file(pa.py_buffer(content)).read_all()

    def digest_of_unit(self, group: str, unit: int) -> str:
        """The identity of one of a unit's files, as ingest wrote it.

        Args:
            group: "samples" or "captions".
            unit: Number of the unit, from 0.

        Returns:
            sha256, hexadecimal.
        """
        digest: str = self.units[f"{group}_sha256"][unit].as_py()
        return digest

    def image_path(self, file: str) -> str:
        """Where a source file is.

        Args:
            file: A sample's `image.file`.

        Returns:
            Its absolute path or URL.
        """
        if is_url(file) or Path(file).is_absolute():
            return file
        return f"{self.root}/{file}"

    def families(self, kind: str) -> list[FamilyHandle]:
        """List the families of one kind, unfinished ones too.

        Args:
            kind: "text" or "latents".

        Returns:
            Handles sorted by directory: name, directory, fingerprint, spec, and whether the family
                is complete.
        """
        parent = self.folder.child(kind)
        found = []
        for directory in parent.folders():
            try:
                facts = unseal(parent.read_bytes(f"{directory}/{FAMILY_FILE}"))
            except (FileNotFoundError, IsADirectoryError, ValueError):
                # nothing was ever computed here (the spec is written first), or `verify` names the
                # damage
                continue
            complete = parent.exists(f"{directory}/{MANIFEST_FILE}")
            rolling = not complete and parent.exists(f"{directory}/{ROLLING_FILE}")
            identity = (facts["name"], facts["fingerprint"], facts["spec"])
            found.append(FamilyHandle(kind, directory, *identity, complete, rolling))
        return found

    def text_families(self) -> list[FamilyHandle]:
        """List the text families, as `families("text")` does.

        Returns:
            Handles sorted by directory.
        """
        return self.families("text")

    def latent_families(self) -> list[FamilyHandle]:
        """List the latents families, as `families("latents")` does.

        Returns:
            Handles sorted by directory.
        """
        return self.families("latents")

    def text_family(
        self, wanted: str, keep_open: int = OPEN_FILES, rolling: bool = False
    ) -> TextFamily:
        """Open a finished text family.

        Args:
            wanted: Its name, directory, or at least 12 digits of its fingerprint.
            keep_open: Unit files kept open at once; at least as many as a reader moves among.
            rolling: Whether to accept a rolling family too, whose reader waits for units that are
                not there.

        Returns:
            The family, ready to read.

        Raises:
            InputError: No such family, an unfinished one, or several that fit.
        """
        handle = self._find("text", wanted, rolling)
        opened = RollingTextFamily if handle.rolling else TextFamily
        return opened(self.folder, handle, self.digest, self.num_units, keep_open)

    def latent_family(self, wanted: str, keep_open: int = OPEN_FILES) -> LatentFamily:
        """Open a finished latents family.

        Args:
            wanted: Its name, directory, or at least 12 digits of its fingerprint.
            keep_open: Unit files kept open at once; at least as many as a reader moves among.

        Returns:
            The family, ready to read.

        Raises:
            InputError: No such family, an unfinished one, or several that fit.
        """
        return LatentFamily(
            self.folder, self._find("latents", wanted), self.digest, self.num_units, keep_open
        )

    def _find(self, kind: str, wanted: str, rolling: bool = False) -> FamilyHandle:
        families = self.families(kind)
        job = "embed" if kind == "text" else "latents"
        matches = [
            family
            for family in families
            if wanted in (family.name, family.directory)
            or (len(wanted) >= 12 and family.fingerprint.startswith(wanted))
        ]
        known = (
            ", ".join(f"{f.directory}{'' if f.complete else ' (incomplete)'}" for f in families)
            or "none"
        )
        if not matches:
            raise InputError(
                f"{self.folder.location}: no {kind} family {wanted!r}; there are: {known}. Make "
                f"it with: lidit {job}"
            )
        complete = [family for family in matches if family.complete]
        if rolling and not complete:
            complete = [family for family in matches if family.rolling]
        if not complete:
            raise InputError(
                f"{self.folder.location}/{kind}/{matches[0].directory}: incomplete (no "
                f"{MANIFEST_FILE}); run the same "
                f"lidit {job} command again to finish it"
            )
        if len(complete) > 1:
            names = ", ".join(family.directory for family in complete)
            fields = "; ".join(spec_differences(complete[0].spec, complete[1].spec))
            raise InputError(
                f"{self.folder.location}: {kind} family {wanted!r} is ambiguous: {names} "
                f"(differing: {fields}); name "
                "the directory"
            )
        return complete[0]


def publish_unit(
    folder: Folder, unit: int, digits: int, source: str, samples: pa.Table, captions: pa.Table
) -> dict[str, Any]:
    """Write one unit's two files; returns the unit's row of the unit table."""
    counted = samples["bucket"].value_counts().to_pylist()
    buckets = sorted(
        ({"bucket": c["values"], "samples": c["counts"]} for c in counted),
        key=lambda b: str(b["bucket"]),
    )
    row: dict[str, Any] = {"unit": unit, "source": source, "buckets": buckets}
    for group, table in (("samples", samples), ("captions", captions)):
        child = folder.child(group)
        child.create()
        file = publish_table(child, f"{unit_name(unit, digits)}.arrow", table)
        row |= {group: table.num_rows, f"{group}_bytes": file.bytes, f"{group}_sha256": file.sha256}
    return row


def publish_corpus(
    folder: Folder,
    unit_rows: Sequence[dict[str, Any]],
    digits: int,
    root: str,
    sources: pa.Table,
    settings: dict[str, Any],
    totals: dict[str, Any],
) -> Corpus:
    """Write the unit table, the source table and, last, corpus.json. The corpus exists from then
    on.

    The digest covers format, settings and every unit's bytes; not `root`, so a corpus may move with
    its sources.
    """
    folder.create()
    units = pa.Table.from_pylist(sorted(unit_rows, key=lambda row: row["unit"]), schema=UNITS)
    units_file = publish_table(folder, lambda sha256: f"units-{sha256[:12]}.arrow", units)
    sources_file = publish_table(folder, lambda sha256: f"sources-{sha256[:12]}.arrow", sources)
    facts = {
        "format": FORMAT_VERSION,
        "digest": digest_of(
            {"format": FORMAT_VERSION, "settings": settings, "units": units_file.sha256}
        ),
        "root": root,
        "settings": settings,
        "unit_digits": digits,
        "totals": {
            "units": units.num_rows,
            "samples": sum(units["samples"].to_pylist()),
            "captions": sum(units["captions"].to_pylist()),
            **totals,
        },
        "units": named(units_file),
        "sources": named(sources_file),
    }
    publish_bytes(folder, CORPUS_FILE, seal(facts))
    return Corpus.open(folder)


def publish_root(corpus: Corpus, root: str) -> Corpus:
    """Note that the source files lie below `root` now: the one thing about a finished corpus that
    may change.
    """
    publish_bytes(corpus.folder, CORPUS_FILE, seal({**corpus.facts, "root": root}))
    return Corpus.open(corpus.folder)
