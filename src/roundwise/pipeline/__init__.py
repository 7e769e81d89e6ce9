"""The run: calibration text in, paused forward through the blocks, shards and journal out."""
