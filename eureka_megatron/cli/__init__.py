"""The command line: `eureka` and what it is called with."""

from eureka_megatron.cli.commands import main

__all__ = ["main"]
