"""What calibration text matters: KL of the bundled model quantized on different texts.

    python benchmarks/calibration.py               every row at 3 and 4 bits; ten minutes on two cores
    python benchmarks/calibration.py --bits 3      at one width

The model was trained on the Python standard library, and is judged on files of it that were held out:
20,480 tokens, in float32. Calibration: 128 windows of 512 tokens; `self` is what the model writes when
nothing is given, `noise` tokens drawn at random, which shows how much the text matters at all.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import roundwise as rw
from roundwise.calibration.sources import read_text
from roundwise.checkpoint.hub import bundled_model
from roundwise.evaluation.divergence import divergence

TOKENS, SAMPLES, LENGTH, VOCABULARY = 20_480, 128, 512, 4096


def texts() -> dict[str, Any]:
    """Name of a row -> calibration."""
    generator = random.Random(0)
    noise = [[generator.randrange(2, VOCABULARY) for _ in range(LENGTH)] for _ in range(SAMPLES)]
    return {"python-stdlib": "python-stdlib", "self": "self", "noise": noise}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bits", type=int, nargs="*", default=[3, 4])
    args = parser.parse_args()
    base, tokenizer = rw.load(bundled_model(), dtype=torch.float32)
    text = read_text("python-stdlib")[: 8 * TOKENS]
    ids = tokenizer(text, verbose=False)["input_ids"][:TOKENS]
    for bits in args.bits:
        for name, calibration in texts().items():
            begun = time.monotonic()
            with tempfile.TemporaryDirectory() as scratch:
                rw.quantize(
                    bundled_model(), Path(scratch) / "out",
                    rw.QuantizeConfig(bits=bits),
                    calibration, samples=SAMPLES, seq_len=LENGTH,
                )  # fmt: skip
                seconds = time.monotonic() - begun
                model, _ = rw.load(Path(scratch) / "out", dtype=torch.float32)
                found = divergence(base, model, ids)
            print(
                f"{bits} bit  {name:14} KL {found.kl_divergence:.6f}  "
                f"perplexity {found.perplexity[1]:.3f}  {seconds:.0f} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
