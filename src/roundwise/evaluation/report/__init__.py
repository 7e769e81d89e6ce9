"""One page about a run: what it made, what it lost, what it took. Knows files; changes none."""
