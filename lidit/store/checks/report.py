"""What a verification found."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong. family: (kind, directory) or None for what ingest wrote; unit: None
    beyond one unit.
    """

    file: str
    reason: str
    remedy: str
    family: tuple[str, str] | None = None
    unit: int | None = None

    def __str__(self) -> str:
        return f"{self.file}: {self.reason}; {self.remedy}"


@dataclass
class VerifyReport:
    """problems: empty when the corpus is sound; notes: unfinished families, which are no error."""

    files: int = 0
    bytes: int = 0
    rows_encoded_again: int = 0
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def sound(self) -> bool:
        return not self.problems
