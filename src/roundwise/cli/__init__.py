"""The command line: one file per command; each parses, calls the library and prints."""

from roundwise.cli.app import main

__all__ = ["main"]
