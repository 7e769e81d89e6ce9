"""Measures the generation speed of a model loaded with roundwise.load, quantized or not.

    python run_generate.py MODEL PROMPT_TOKENS NEW_TOKENS

Prints one JSON object for each line read from stdin: tokens per second of the prompt and of generation
after it, and the peak memory so far.
"""

from __future__ import annotations

import json
import sys
import time

import torch
from peak import peak

import roundwise as rw

folder, prompt, new = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
begun = time.perf_counter()
model, _ = rw.load(folder)
loading = time.perf_counter() - begun


def seconds(tokens: int) -> float:
    """Returns the seconds of generating this many tokens."""
    ids = torch.randint(0, model.config.vocab_size, (1, prompt))
    begun = time.perf_counter()
    model.generate(ids, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
    return time.perf_counter() - begun


for _ in sys.stdin:
    first, total = seconds(1), seconds(1 + new)
    result = {"prompt": prompt / first, "generation": new / (total - first), "peak": peak()}
    print(json.dumps({**result, "loading": loading}), flush=True)
