"""Check the lock file against the security floors of SECURITY.md; run pip-audit as well where it is
installed.

    python infra/audit.py [constraints.txt]

Prints one line per finding; exit code 2 when there is any. The floors are ours and work offline;
pip-audit asks the public advisory database and needs a network.
"""

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement
from packaging.version import Version

# package -> (first good version, why)
FLOORS = {
    "ray": (
        "2.55",
        "CVE-2026-41486 (Parquet extension metadata unpickled), CVE-2026-27482, CVE-2023-48022 "
        "(open job API)",
    ),
    "transformers": ("5.5", "CVE-2026-4372 (config.json runs code), CVE-2026-5241, CVE-2026-1839"),
    "mlflow": ("3.11", "CVE-2026-2614, CVE-2026-2651, CVE-2026-2652, CVE-2026-4137"),
    "torch": ("2.6", "CVE-2025-32434 (torch.load with weights_only=True ran code)"),
}


def locked_versions(text: str) -> tuple[dict[str, Version], list[str]]:
    """(package -> version, findings) of a constraints file; a line that is not `name==version` is a
    finding.
    """
    versions: dict[str, Version] = {}
    findings = []
    for number, line in enumerate(text.splitlines(), 1):
        line = line.partition("#")[0].strip()
        if not line:
            continue
        try:
            requirement = Requirement(line)
            (pin,) = requirement.specifier
            if pin.operator != "==" or pin.version.endswith("*"):
                raise ValueError
            versions[requirement.name.lower().replace("_", "-")] = Version(pin.version)
        except (InvalidRequirement, ValueError):
            findings.append(
                f"line {number}: {line!r} does not pin one version from the index (NAME==VERSION)"
            )
    return versions, findings


def audit(text: str) -> list[str]:
    """Every finding of a constraints file."""
    versions, findings = locked_versions(text)
    for package, (floor, reason) in FLOORS.items():
        if package not in versions:
            findings.append(
                f"{package}: not in the lock file; {floor} or later is needed: {reason}"
            )
        elif versions[package] < Version(floor):
            findings.append(
                f"{package} {versions[package]} is below {floor}: {reason}; raise it and lock anew"
            )
    return findings


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "lock", nargs="?", type=Path, default=Path(__file__).parents[1] / "constraints.txt"
    )
    lock = parser.parse_args().lock
    findings = audit(lock.read_text())
    print(*findings, sep="\n", end="\n" if findings else "")
    code = 2 if findings else 0
    if program := shutil.which("pip-audit"):
        code = code or (
            2
            if subprocess.run([program, "--no-deps", "-r", str(lock)], check=False).returncode
            else 0
        )
    else:
        print(
            "pip-audit is not installed: only the floors were checked (pip install pip-audit)",
            file=sys.stderr,
        )
    if code == 0:
        print(f"{lock.name}: no finding")
    return code


if __name__ == "__main__":
    sys.exit(main())
