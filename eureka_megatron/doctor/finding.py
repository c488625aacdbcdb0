"""One row of the report."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Finding:
    """One row. Example: Finding("ray", "present", "2.60.0", required=True, lost="…", fix="python -m pip install …")."""

    name: str
    status: Literal["present", "limited", "absent"]
    found: str  # version, size, or what is wrong
    required: bool
    lost: str  # what does not work without it
    fix: str  # the command that mends it, and where one is not enough what else

    @property
    def blocks(self) -> bool:
        return self.required and self.status == "absent"
