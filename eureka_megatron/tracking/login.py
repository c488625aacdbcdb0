"""Whether wandb could go online. Apart from the tracker, because `eureka doctor` must run where packages are missing."""

import netrc
import os
from typing import Literal, get_args
from urllib.parse import urlparse

Mode = Literal["online", "offline", "disabled"]


def wandb_mode(setting: Literal["auto", "online", "offline", "disabled"]) -> Mode:
    """`auto` follows WANDB_MODE where set, else goes online exactly when there is a login."""
    if setting != "auto":
        return setting
    asked = os.environ.get("WANDB_MODE", "")
    for mode in get_args(Mode):
        if asked == mode:
            return mode
    return "online" if has_wandb_login() else "offline"


def has_wandb_login() -> bool:
    """Whether wandb would find a key, in the environment or the user's netrc. Imports no wandb, asks no server."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    path = os.path.expanduser(os.environ.get("NETRC", "~/.netrc"))  # without any home it stays as it is
    try:
        return host in netrc.netrc(path).hosts
    except (OSError, netrc.NetrcParseError):
        return False
