"""Errors that are the user's to mend. The command line prints them as `error: …`, without a traceback.

Everything else that is raised is a defect of this package and keeps its traceback.
"""

from collections.abc import Iterable
from difflib import get_close_matches
from signal import Signals


class UserError(ValueError):
    """Bad data, weights or environment: exit code 1. The message names the file or tensor and what would be right."""

    exit_code = 1


class ConfigError(UserError):
    """Bad configuration or usage: exit code 2. The message names the key, what was found and what would be right."""

    exit_code = 2


class Stopped(BaseException):
    """A signal ended the run; no error, so that nothing that handles errors holds it up. Exit code 128 + its number, or `exit_code`."""

    def __init__(self, signal: Signals, note: str = "", exit_code: int | None = None) -> None:
        super().__init__("interrupted" if signal.name == "SIGINT" else f"stopped by {signal.name}")
        self.signal, self.note = signal, note
        self.exit_code = 128 + signal if exit_code is None else exit_code


def nearest(name: str, valid: Iterable[str]) -> str:
    """A hint such as `; did you mean 'lr'?`, or the valid names when none is near."""
    names = sorted(valid)
    close = get_close_matches(name, names, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; valid: {', '.join(names)}"
