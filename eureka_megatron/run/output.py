"""Where a run's release goes: nothing that lies there is lost."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

from eureka_megatron.tracking.console import tell


@contextmanager
def replacing(output: Path) -> Iterator[Path]:
    """Where to write a release that is to lie at `output`. What lies there already moves aside once the new one is whole."""
    if not taken(output):
        yield output
        return
    fresh, earlier = _unused(f"{output}.new"), _unused(f"{output}_earlier")
    yield fresh
    output.rename(earlier)
    fresh.rename(output)
    tell(f"the earlier weights of {output} lie in {earlier}")


def taken(output: Path) -> bool:
    """Whether something lies there; an empty folder is nothing."""
    return os.path.lexists(output) and not (output.is_dir() and not any(output.iterdir()))


def _unused(name: str) -> Path:
    """The name, or with the first number behind it that nothing bears."""
    return next(path for n in count(1) if not os.path.lexists(path := Path(name if n == 1 else f"{name}_{n}")))
