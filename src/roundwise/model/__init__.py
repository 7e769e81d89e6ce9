"""A transformers model on the meta device."""
