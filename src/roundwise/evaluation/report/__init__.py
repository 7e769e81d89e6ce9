"""Report of a run: one HTML page about its result, accuracy, time and memory. Changes no other file."""
