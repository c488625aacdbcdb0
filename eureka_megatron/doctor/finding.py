"""One row of the report, and what a check answers before the table's advice is added."""

from dataclasses import dataclass
from typing import Literal

Status = Literal["present", "limited", "absent"]


@dataclass(frozen=True)
class Finding:
    """One row. Example: Finding("ray", "present", "2.60.0", required=True, lost="…", fix="python -m pip install …")."""

    name: str
    status: Status
    found: str  # version, size, or what is wrong
    required: bool
    lost: str  # what does not work without it
    fix: str  # the command that mends it, and where one is not enough what else

    @property
    def blocks(self) -> bool:
        return self.required and self.status == "absent"


@dataclass(frozen=True)
class Answer:
    """What a check found; `lost`, `fix` and `required` go before the table's where it depends on what was found."""

    status: Status
    found: str
    lost: str | None = None
    fix: str | None = None
    required: bool | None = None
