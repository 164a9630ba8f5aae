"""A complete family, whatever it holds: its manifest, its records, its units' files, checked and
kept open.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from functools import cached_property
from typing import Any

import pyarrow as pa

from lidit.errors import InputError
from lidit.store.files.folder import Folder
from lidit.store.latent_file import LatentFile
from lidit.store.manifest import FAMILY_FILE, MANIFEST_FILE, FamilyHandle, read_named_table
from lidit.store.schema import digest_of, unseal
from lidit.store.text_file import TextFile

# A mapped file costs an address range and a descriptor, not memory; behind a URL it costs the
# unit's bytes.
OPEN_FILES = 64


class Family:
    """What text and latents families share. Open through `Corpus.text_family` and
    `Corpus.latent_family`.

    corpus: the corpus's folder, whose digest and number of units the family must fit.
    keep_open: unit files kept open at once; at least the units a reader moves among.
    """

    def __init__(
        self,
        corpus: Folder,
        handle: FamilyHandle,
        corpus_digest: str,
        num_units: int,
        keep_open: int = OPEN_FILES,
    ) -> None:
        self.kind, self.directory, self.name = handle.kind, handle.directory, handle.name
        self.corpus_location, self.num_units = corpus.location, num_units
        self.folder = corpus.child(handle.kind).child(handle.directory)
        self.spec, self.fingerprint = handle.spec, handle.fingerprint
        self._files: OrderedDict[int, Any] = OrderedDict()
        self._lock = threading.Lock()
        self.keep_open = keep_open
        self._verified: set[int] = set()
        facts = self._json(FAMILY_FILE)
        self.manifest = self._json(self._manifest_file)
        where = self.folder.location
        if (
            digest_of(self.spec) != self.fingerprint
            or self.manifest.get("fingerprint") != self.fingerprint
        ):
            raise InputError(
                f"{where}: the fingerprint does not belong to the spec in {FAMILY_FILE}; "
                "run lidit verify"
            )
        for name, found in ((FAMILY_FILE, facts), (self._manifest_file, self.manifest)):
            if found.get("corpus") != corpus_digest:
                raise InputError(
                    f"{where}/{name}: made for another corpus; delete this directory and "
                    "compute it again"
                )
        self.digest: str = self.manifest["digest"]

    def _json(self, name: str) -> dict[str, Any]:
        try:
            return unseal(self.folder.read_bytes(name))
        except FileNotFoundError:
            raise InputError(f"{self.folder.where(name)}: missing; run lidit verify") from None
        except IsADirectoryError:
            raise InputError(
                f"{self.folder.where(name)}: is a folder, not a file; run lidit verify"
            ) from None
        except ValueError:
            raise InputError(f"{self.folder.where(name)}: damaged; run lidit repair") from None

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_lock", "_files")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._files, self._lock = OrderedDict(), threading.Lock()

    @cached_property
    def records(self) -> pa.Table:
        """The table of all commit records, ordered by unit: unit, file, rows, tokens, bytes, sha256
        and more.
        """
        table = read_named_table(self.folder, self.manifest["records"])
        if table["unit"].to_pylist() != list(range(self.num_units)):
            raise InputError(
                f"{self.folder.location}: the manifest does not cover every unit; run lidit repair"
            )
        return table

    def record(self, unit: int) -> dict[str, Any]:
        """The commit record of one unit.

        Args:
            unit: Number of the unit, from 0.

        Returns:
            A row of `records` as a dictionary.

        Raises:
            InputError: No such unit.
        """
        if not 0 <= unit < self.records.num_rows:
            raise InputError(
                f"{self.folder.location}: no unit {unit}; there are {self.records.num_rows}, from 0"
            )
        row: dict[str, Any] = self.records.slice(unit, 1).to_pylist()[0]
        return row

    def verify_unit(self, unit: int) -> None:
        """Check size and sha256 of a unit's file, once per unit and object.

        Args:
            unit: Number of the unit, from 0.

        Raises:
            InputError: The file is missing or damaged.
        """
        if unit in self._verified:
            return
        record = self.record(unit)
        problem = self._problem(record)
        # perhaps only the local copy of an object is damaged
        if problem and self.folder.forget(record["file"]):
            problem = self._problem(record)
        if problem:
            raise InputError(f"{self.folder.where(record['file'])}: {problem}; {self._remedy}")
        self._verified.add(unit)

    def _problem(self, record: dict[str, Any]) -> str | None:
        """Why a unit's file cannot be used; None when it is what its record says."""
        try:
            content = self.folder.map(record["file"], keep_local=True)
        except FileNotFoundError:
            return "missing"
        except IsADirectoryError:
            return "is a folder, not a file"
        if len(content) != record["bytes"]:
            return f"{len(content)} bytes, its record says {record['bytes']}"
        if hashlib.sha256(content).hexdigest() != record["sha256"]:
            return "damaged (sha256 differs from its record)"
        return None

    @property
    def _remedy(self) -> str:
        job = "embed" if self.kind == "text" else "latents"
        return (
            f"run lidit repair {self.corpus_location}, then lidit {job} to compute this unit again"
        )

    def _open(self, unit: int) -> Any:
        with self._lock:
            if unit in self._files:
                self._files.move_to_end(unit)
                return self._files[unit]
        record = self.record(unit)
        where = self.folder.where(record["file"])
        try:
            file = self._load(record, where)
        except FileNotFoundError:
            raise InputError(f"{where}: missing; {self._remedy}") from None
        except pa.ArrowInvalid as error:
            raise InputError(f"{where}: damaged ({error}); {self._remedy}") from None
        if file.rows != record["rows"]:
            raise InputError(
                f"{where}: {file.rows} rows, its record says {record['rows']}; {self._remedy}"
            )
        with self._lock:
            self._files[unit] = file
            while len(self._files) > self.keep_open:
                self._files.popitem(last=False)
        return file

    def _load(self, record: dict[str, Any], where: str) -> TextFile | LatentFile:
        """A unit's file. Raises FileNotFoundError, pa.ArrowInvalid or InputError."""
        raise NotImplementedError

    _manifest_file = MANIFEST_FILE
