"""Fetching pinned packages of pictures with npm and apt, and reading them without unpacking or
running anything.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

from lidit.errors import InputError, one_line

MAX_MEMBER_BYTES = 64 * 1024 * 1024


@dataclass(frozen=True)
class Package:
    """One archive: an npm tarball or a Debian package. `sha256` is that of the archive as its
    registry serves it.
    """

    client: Literal["npm", "apt"]
    name: str
    version: str
    sha256: str

    @property
    def file(self) -> str:
        """The name the client gives the archive, with * where it depends on the machine."""
        if self.client == "npm":
            return f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}.tgz"
        return f"{self.name}_{self.version.replace(':', '%3a')}_*.deb"

    def __str__(self) -> str:
        return f"{self.name}{'@' if self.client == 'npm' else '='}{self.version}"


def fetch(package: Package, folder: Path) -> Path:
    """The package's archive in `folder`, downloaded where it is not there yet, checked against its
    sha256.

    No script of a package is run: npm only packs what it downloads, apt only downloads. Raises
    InputError where the client is missing, the registry does not answer, or the archive is not the
    pinned one.
    """
    found = _in_folder(package, folder)
    if found is None:
        _download(package, folder)
        found = _in_folder(package, folder)
    if found is None:
        raise InputError(f"{package}: {package.client} wrote no {package.file} into {folder}")
    with found.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != package.sha256:
        raise InputError(
            f"{found}: sha256 {digest}, expected {package.sha256}: not the pinned {package}; "
            "delete it, and ask who "
            "runs the registry what it serves"
        )
    return found


def _in_folder(package: Package, folder: Path) -> Path | None:
    return next(iter(sorted(folder.glob(package.file))), None)


def _download(package: Package, folder: Path) -> None:
    commands = {
        "npm": [
            "npm",
            "pack",
            "--ignore-scripts",
            "--silent",
            "--pack-destination",
            str(folder.resolve()),
        ],
        "apt": ["apt-get", "--quiet", "--quiet", "download"],
    }
    command = [*commands[package.client], str(package)]
    if shutil.which(command[0]) is None:
        raise InputError(
            f"{package}: needs {command[0]}, which is not installed here; fetch {package.file} "
            "elsewhere and name its "
            "folder with --packages"
        )
    folder.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        errors = (
            [line for line in lines if line.startswith(("E:", "npm error", "npm ERR"))]
            or lines
            or ["no message"]
        )
        remedy = (
            "npm config get registry"
            if package.client == "npm"
            else "apt-get update, and the Debian release"
        )
        raise InputError(
            f"{package}: {command[0]} could not fetch it ({errors[0][:200]}); check {remedy}"
        )


def read(package: Package, archive: Path, wanted: Callable[[str], bool]) -> dict[str, bytes]:
    """The wanted regular files of an archive, by their path in the package. Links are left out.

    Raises InputError for an archive that cannot be read to its end.
    """
    found: dict[str, bytes] = {}
    try:
        with (
            _tar(package, archive) as stream,
            tarfile.open(fileobj=stream, mode=_mode(package)) as tar,
        ):
            for member in tar:
                tar.members = []  # type: ignore[attr-defined]  # tarfile keeps every header: memory would grow
                name = member.name.removeprefix("./").removeprefix("package/")
                if not member.isreg() or not wanted(name):
                    continue
                if member.size > MAX_MEMBER_BYTES:
                    raise InputError(
                        f"{archive}: {name} has {member.size} bytes, more than any picture needs"
                    )
                content = tar.extractfile(member)
                assert content is not None
                found[name] = content.read()
    except (tarfile.TarError, EOFError, OSError) as error:
        raise InputError(f"{archive}: cannot be read ({one_line(error)}); delete it") from None
    return found


def _mode(package: Package) -> Literal["r|gz", "r|"]:
    return "r|gz" if package.client == "npm" else "r|"


@contextmanager
def _tar(package: Package, archive: Path) -> Iterator[IO[bytes]]:
    if package.client == "npm":
        with archive.open("rb") as file:
            yield file
        return
    if shutil.which("dpkg-deb") is None:
        raise InputError(
            f"{archive}: reading it needs dpkg-deb; convert the set on a Debian or Ubuntu machine"
        )
    with subprocess.Popen(
        ["dpkg-deb", "--fsys-tarfile", str(archive)], stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        yield process.stdout
        # to its end: dpkg-deb would call a closed pipe an error
        while process.stdout.read(1 << 20):
            pass
    if process.returncode:
        raise InputError(f"{archive}: dpkg-deb cannot read it; delete it")
