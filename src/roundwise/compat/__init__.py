"""Interfaces of other libraries, implemented with roundwise."""
