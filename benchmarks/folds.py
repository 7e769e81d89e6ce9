"""Measures the KL of the bundled model with rotation and other damping.

    python benchmarks/folds.py                 all rows; an hour on two cores
    python benchmarks/folds.py --only rotate   rows whose name contains this
    python benchmarks/folds.py --lopsided      the same model with channels of very unequal size

Calibration: 128 windows of 512 tokens of the Python standard library; KL and perplexity in float32 on
20,480 held-out tokens of it. The lopsided model is the same function, bit for bit: in each norm whose
output feeds linear layers, the gains of 8 random channels are multiplied by 32 and those of 8 others
divided by 32, and the columns of the weights are scaled the other way. Trained models can have channels
like these.
"""

from __future__ import annotations

import argparse
import platform
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

import roundwise as rw
from roundwise.calibration.sources import read_text
from roundwise.evaluation.divergence import divergence
from roundwise.model.residual_trace import trace_residual_stream
from roundwise.model.streamed import open_streamed_model
from roundwise.system.hub import bundled_model

TOKENS = 20_480
VARIANTS: dict[str, dict[str, Any]] = {
    "": {},
    " rotate": {"rotate": True},
    " rotate, seed 1": {"rotate": True, "rotation_seed": 1},
    " damp 0.003": {"damp_percent": 0.003},
    " damp 0.03": {"damp_percent": 0.03},
    " damp 0.1": {"damp_percent": 0.1},
}


def rows(bits: int) -> dict[str, dict[str, Any]]:
    """Returns the settings of each row, by the row's name."""
    settings: dict[str, dict[str, Any]] = {
        "rtn": {"method": "rtn"},
        "rtn rotate": {"method": "rtn", "rotate": True},
    }
    for recipe in ("textbook", "best"):
        settings |= {
            f"{recipe}{name}": {"recipe": recipe, **changes} for name, changes in VARIANTS.items()
        }
    return {f"{bits} bit {name}": {"bits": bits, **each} for name, each in settings.items()}


def lopsided(source: Path, out: Path) -> Path:
    """Writes the model with channels of unequal size; powers of two, so that nothing is rounded."""
    shutil.copytree(source, out)
    tensors = load_file(out / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    trace = trace_residual_stream(open_streamed_model(source, dtype=torch.float32))
    for norm in (norm for block in trace.blocks for norm in block.norms):
        gains = f"{norm.name}.weight"
        factor = torch.ones(len(tensors[gains]))
        chosen = torch.randperm(len(factor), generator=generator)[:16]
        factor[chosen[:8]], factor[chosen[8:]] = 32.0, 1 / 32
        tensors[gains] = tensors[gains] * factor.to(torch.bfloat16)
        for weight in (f"{reader}.weight" for reader in norm.readers):
            tensors[weight] = tensors[weight] / factor.to(torch.bfloat16)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bits", type=int, nargs="*", default=[3, 4])
    parser.add_argument("--only", default="")
    parser.add_argument("--lopsided", action="store_true")
    args = parser.parse_args()
    print(
        f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, "
        f"Python {platform.python_version()}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}, roundwise {rw.__version__}"
    )
    base, tokenizer = rw.load(bundled_model(), dtype=torch.float32)
    text = read_text("python-stdlib")[: 8 * TOKENS]
    ids = tokenizer(text, verbose=False)["input_ids"][:TOKENS]
    with tempfile.TemporaryDirectory() as scratch:
        source = bundled_model()
        if args.lopsided:
            source = lopsided(source, Path(scratch) / "lopsided")
        for name, settings in {k: v for bits in args.bits for k, v in rows(bits).items()}.items():
            if args.only not in name:
                continue
            begun = time.monotonic()
            config = rw.QuantizeConfig(**settings)
            rw.quantize(
                source, Path(scratch) / "out", config, "python-stdlib",
                samples=128, seq_len=512, restart=True,
            )  # fmt: skip
            seconds = time.monotonic() - begun
            model, _ = rw.load(Path(scratch) / "out", dtype=torch.float32)
            result = divergence(base, model, ids)
            print(
                f"{name:30} KL {result.kl_divergence:.5f}  perplexity {result.perplexity[1]:.3f} "
                f"(original {result.perplexity[0]:.3f})  {seconds:.0f} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
