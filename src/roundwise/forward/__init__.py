"""The paused forward of the model."""
