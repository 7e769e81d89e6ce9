"""Serves models over HTTP with OpenAI's API: with vLLM where possible, else with our own small server.

Our server uses transformers' `generate`. docs/serving.md lists what `transformers serve` lacks.
"""
