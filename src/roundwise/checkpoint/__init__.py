"""Reads and writes checkpoints on disk: safetensors files, quantization formats, manifests."""
