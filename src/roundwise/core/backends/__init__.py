"""The solver's inner loops: one protocol (`base`), three implementations, one choice (`dispatch`)."""
