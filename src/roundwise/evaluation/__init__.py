"""Measures models: perplexity, divergence, tasks, speed; compares them and writes reports."""
