"""What a check says: one sentence about what is wrong and one about what to do."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any


class Severity(StrEnum):
    """A note is normal after a crash and goes away by itself."""

    ERROR = "error"
    NOTE = "note"


@dataclass(frozen=True, slots=True)
class Finding:
    """`code` is stable; `promise` is the row of docs/operations.md that does not hold."""

    promise: str
    code: str
    what: str
    advice: str
    severity: Severity = Severity.ERROR

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


Findings = Iterator[Finding]
