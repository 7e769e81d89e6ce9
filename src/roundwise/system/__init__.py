"""Device, memory, timing, processes."""
