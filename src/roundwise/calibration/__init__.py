"""Texts to batches of token windows."""
