"""Logits of a checkpoint as gptqmodel computes them, for the tests in this folder.

Run by gptqmodel's own interpreter and knows nothing of roundwise: what it prints and writes is a
second opinion only as long as no code is shared with the library that is being judged.

    python run_gptqmodel.py CHECKPOINT INPUT.npz OUTPUT.npz [--dtype float16|auto]
    python run_gptqmodel.py --quantize CONFIG.json MODEL INPUT.npz CHECKPOINT

INPUT holds `input_ids` [windows, length] int64. The first form writes `logits` [windows, length,
vocab] float32, `argmax` [windows, length] and `kernels`; the second quantizes MODEL with gptqmodel
on these windows and saves the result as CHECKPOINT.
"""

import argparse
import json
import os
import sys
from pathlib import Path

os.environ.update(  # before the client is imported
    CUDA_VISIBLE_DEVICES="",
    GPTQMODEL_CPU_WORKERS="2",  # on two cores its own default is too few for its loader
    HF_HUB_OFFLINE="1",
    TORCHDYNAMO_DISABLE="1",  # compiling takes half a minute and changes no number
)

import numpy as np
import torch
from gptqmodel import BACKEND, GPTQModel
from gptqmodel.quantization import GPTQConfig


def evaluate(checkpoint: Path, source: Path, target: Path, dtype: str) -> None:
    """Run every window through the checkpoint and keep the logits of all its positions."""
    # "auto" is what a user gets: the model's dtype (bfloat16) and the fastest kernel for it.
    # float16 with the plain torch kernel is the most accurate that there is: no kernel takes
    # float32 without rounding inside (TorchFusedLinear does, and is 3 times less accurate).
    options = {} if dtype == "auto" else {"dtype": torch.float16, "backend": BACKEND.TORCH}
    model = GPTQModel.load(str(checkpoint), device="cpu", **options).model.eval()
    kernels = sorted({type(m).__name__ for m in model.modules() if hasattr(m, "qweight")})
    if not kernels:
        sys.exit("gptqmodel loaded no quantized layer: there is nothing to judge")
    windows = torch.from_numpy(np.load(source)["input_ids"])
    with torch.no_grad():
        logits = model(windows, use_cache=False).logits.float().numpy()
    np.savez(target, logits=logits, argmax=logits.argmax(-1), kernels=np.array(kernels))


def quantize(config: Path, model_dir: Path, source: Path, checkpoint: Path) -> None:
    """Let gptqmodel make a checkpoint of its own, to see whether others can read it."""
    model = GPTQModel.load(str(model_dir), GPTQConfig(**json.loads(config.read_text())))
    model.quantize(np.load(source)["input_ids"].tolist(), batch_size=4)
    model.save(str(checkpoint))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path, help="with --quantize: the model to quantize")
    parser.add_argument("input", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--dtype", default="float16", choices=["float16", "auto"])
    parser.add_argument("--quantize", type=Path, metavar="CONFIG")
    args = parser.parse_args()
    if args.quantize:
        quantize(args.quantize, args.checkpoint, args.input, args.output)
    else:
        evaluate(args.checkpoint, args.input, args.output, args.dtype)


if __name__ == "__main__":
    main()
