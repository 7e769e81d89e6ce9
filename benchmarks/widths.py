"""Compares `--target-bpw` with one width for all layers at the same size: KL of the bundled model.

    python benchmarks/widths.py                 3, 3.5 and 4 bits; ten minutes on two cores
    python benchmarks/widths.py --seeds 0 1 2   several sets of calibration windows

Calibration: 128 windows of 512 tokens of the Python standard library; KL and perplexity in float32 on
20,480 held-out tokens of it. The target is the size of the model with one width.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch

import roundwise as rw
from roundwise.calibration.sources import read_text
from roundwise.evaluation.divergence import divergence
from roundwise.system.hub import bundled_model

TOKENS = 20_480


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="*", default=[0])
    parser.add_argument("--bits", type=int, nargs="*", default=[3, 4])
    parser.add_argument("--target", type=float, nargs="*", default=[3.5])
    args = parser.parse_args()
    base, tokenizer = rw.load(bundled_model(), dtype=torch.float32)
    text = read_text("python-stdlib")[: 8 * TOKENS]
    ids = tokenizer(text, verbose=False)["input_ids"][:TOKENS]

    def measure(name: str, config: rw.QuantizeConfig, seed: int) -> float:
        begun = time.monotonic()
        with tempfile.TemporaryDirectory() as scratch:
            result = rw.quantize(
                bundled_model(), Path(scratch) / "out", config, "python-stdlib",
                samples=128, seq_len=512, seed=seed,
            )  # fmt: skip
            seconds = time.monotonic() - begun
            model, _ = rw.load(Path(scratch) / "out", dtype=torch.float32)
            quality = divergence(base, model, ids)
        print(
            f"seed {seed}  {name:20} {result.bits_per_weight:.3f} bits per weight  "
            f"KL {quality.kl_divergence:.6f}  perplexity {quality.perplexity[1]:.3f}  {seconds:.0f} s",
            flush=True,
        )
        return result.bits_per_weight

    for seed in args.seeds:
        for bits in args.bits:
            size = measure(f"{bits} bit", rw.QuantizeConfig(bits=bits), seed)
            measure(f"target {size:.3f}", rw.QuantizeConfig(target_bpw=size), seed)
        for target in args.target:
            measure(f"target {target}", rw.QuantizeConfig(target_bpw=target), seed)


if __name__ == "__main__":
    main()
