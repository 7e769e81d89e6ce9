"""Measures a model through the server that serves it: perplexity, divergence, answers, speed."""
