"""Command line: one file per command in `commands`, which parses, calls the library and prints."""

from roundwise.cli.app import main

__all__ = ["main"]
