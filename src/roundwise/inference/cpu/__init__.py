"""Parts of inference for the CPU alone."""
