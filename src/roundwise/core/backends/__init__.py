"""The solver's inner loops on each kind of machine."""
