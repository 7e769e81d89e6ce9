"""Builds transformers models on the meta device and gives access to their weights block by block."""
