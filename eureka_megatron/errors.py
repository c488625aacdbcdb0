"""Errors that are the user's to mend. The command line prints them as `error: …`, without a traceback.

Everything else that is raised is a defect of this package and keeps its traceback.
"""

import errno
import re
from collections.abc import Iterable
from difflib import get_close_matches
from signal import Signals

# What a machine or a path refuses is no defect of the package: full, read-only, forbidden, a file where a folder must be.
MACHINE_ERRORS = {
    *(
        errno.ENOSPC,
        errno.EDQUOT,
        errno.EFBIG,
        errno.EROFS,
        errno.EACCES,
        errno.EPERM,
        errno.EIO,
        errno.ESTALE,
        errno.ENOMEM,
    ),
    *(errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP, errno.EMFILE, errno.ENFILE),
}


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


def from_remote(where: str, error: Exception) -> Exception:
    """What the driver raises for an error of a remote process, as Ray hands it over: a user's error in one line, a defect as it is.

    Args:
        where: begins the line, e.g. "trainer rank 1".
    """
    cause = getattr(error, "cause", None)
    if isinstance(cause, UserError):
        return cause
    if isinstance(cause, OSError) and cause.errno in MACHINE_ERRORS:
        return UserError(f"{where}: {cause.filename or 'where it writes'}: {cause.strerror}")
    if isinstance(cause, MemoryError) or type(cause).__name__ == "OutOfMemoryError":
        return UserError(
            f"{where}: {' '.join(str(cause).split())[:200] or 'out of memory'}; less is needed with a smaller "
            "training.max_tokens_per_micro_batch, with model.recompute=full, or on more ranks (parallel)"
        )
    return error


def last_message(error: Exception) -> str:
    """The remote exception's own words, in one line, from a text that ends with its traceback."""
    lines = [line.rstrip() for line in str(error).splitlines() if line.strip()]
    begins = [
        number for number, line in enumerate(lines) if re.match(r"[\w.]+(Error|Exception|Exit|Interrupt)\b", line)
    ]
    words = lines[begins[-1] if begins else -1 :]
    return " ".join(" ".join(line for line in words if "For further information visit" not in line).split())[:400]
