"""Checkpoints as bytes on disk."""
