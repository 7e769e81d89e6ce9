"""Logits of a checkpoint as llm-compressor loads it, for the tests in this folder.

Run by llm-compressor's own interpreter and knows nothing of roundwise.

    python run_llmcompressor.py CHECKPOINT INPUT.npz OUTPUT.npz

INPUT holds `input_ids` [windows, length] int64; OUTPUT gets `logits` [windows, length, vocab] float32
and `packed`, whether its loader found a compressed-tensors checkpoint.
"""

import argparse
import os
from pathlib import Path

os.environ.update(CUDA_VISIBLE_DEVICES="", HF_HUB_OFFLINE="1")  # before it is imported

import numpy as np
import torch
from llmcompressor.args import ModelArguments
from llmcompressor.entrypoints.utils import (
    initialize_model_from_path,
    is_model_ct_quantized_from_path,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=str)
    parser.add_argument("input", type=Path)
    parser.add_argument("output", type=Path)
    args = parser.parse_args()
    model = initialize_model_from_path(ModelArguments(model=args.checkpoint, precision="float32"))
    windows = torch.from_numpy(np.load(args.input)["input_ids"])
    with torch.no_grad():
        logits = model.eval()(windows, use_cache=False).logits.float().numpy()
    np.savez(args.output, logits=logits, packed=is_model_ct_quantized_from_path(args.checkpoint))


if __name__ == "__main__":
    main()
