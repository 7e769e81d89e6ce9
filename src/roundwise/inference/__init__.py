"""Runs quantized checkpoints: loading, QuantLinear and its kernels, text generation, serving."""
