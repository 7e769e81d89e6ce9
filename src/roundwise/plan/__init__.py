"""Plans of a run: its layers, memory, disk and time."""
