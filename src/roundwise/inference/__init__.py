"""Running quantized checkpoints: QuantLinear, loading, the hook into transformers."""
