"""Serving over HTTP as OpenAI's API has it: by vLLM where it can, by transformers' `generate` otherwise.

We have a small server of our own for the latter, not the one that transformers comes with: see
docs/serving.md for what that one leaves out.
"""
