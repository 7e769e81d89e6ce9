"""Measures calibration and KL divergence with texts of up to 32 thousand tokens, and the peak memory.

    python benchmarks/long_context.py                     the bundled model; half an hour on two cores
    python benchmarks/long_context.py --lengths 2048 8192 shorter texts
    python benchmarks/long_context.py --model Qwen/Qwen3-0.6B --held-out 2

Two checkpoints are made for each length: one calibrated with windows of 512 tokens, one with windows of
the full length, and of as many tokens together. The KL divergence to the original is that of each half
of the text: tokens 0 to 511, 512 to 1023, 1024 to 2047, and so on.

Logits are computed for a few tokens at a time, and attention by torch's `sdpa`, which needs no matrix of
all pairs of tokens. Each run is a process of its own; its peak memory is read from the kernel (VmHWM).
A model whose config has fewer positions gets as many as needed: its rotary embedding goes on, and what
it predicts there is compared, good or not.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import transformers

import roundwise as rw
from roundwise.calibration.sources import read_text
from roundwise.calibration.special_tokens import special_tokens
from roundwise.system.hub import bundled_model, local_folder

#: Tokens of the short windows, and tokens whose logits are computed together.
SHORT, CHUNK = 512, 512

CHILD = """
import json, sys
from pathlib import Path
import torch
import roundwise as rw

def status(field):
    line = next(l for l in open("/proc/self/status") if l.startswith(field + ":"))
    return int(line.split()[1]) * 1024

base = status("VmRSS")
model, out, length, samples, bits, memory = sys.argv[1:]
result = rw.quantize(
    model, out, rw.QuantizeConfig(bits=int(bits)), "python-stdlib", samples=int(samples),
    seq_len=int(length), batch_size=1, max_memory=memory or None,
)
print(json.dumps({"peak": status("VmHWM") - base, "planned": result.planned_peak_bytes,
                  "seconds": result.seconds, "mode": result.mode, "issues": result.not_as_asked}))
"""


def lengthened(model: Path, length: int, folder: Path) -> Path:
    """Returns the model with enough positions; a copy if its config has fewer."""
    config = json.loads((model / "config.json").read_text())
    if config.get("max_position_embeddings", length) >= length:
        return model
    copy = Path(shutil.copytree(model, folder / f"positions-{length}"))
    (copy / "config.json").write_text(json.dumps({**config, "max_position_embeddings": length}))
    return copy


def quantize(model: Path, out: Path, length: int, samples: int, bits: int, memory: str) -> dict:
    """Quantizes in a process of its own; returns what it needed."""
    given = [str(part) for part in (model, out, length, samples, bits, memory)]
    done = subprocess.run(
        [sys.executable, "-c", CHILD, *given], check=True, stdout=subprocess.PIPE, text=True
    )
    return json.loads(done.stdout.splitlines()[-1])


@torch.no_grad()
def kl_by_position(base: object, quantized: object, windows: list[list[int]]) -> torch.Tensor:
    """Returns KL(original || quantized) at each position, averaged over the windows."""
    total = torch.zeros(len(windows[0]), dtype=torch.float64)
    for window in windows:
        ids = torch.tensor([window])
        states = [m.base_model(input_ids=ids, use_cache=False)[0][0] for m in (base, quantized)]
        for start in range(0, len(window), CHUNK):
            part = slice(start, start + CHUNK)
            p, q = (
                torch.log_softmax(m.get_output_embeddings()(h[part]).float(), -1)
                for m, h in zip((base, quantized), states, strict=True)
            )
            total[part] += (p.exp() * (p - q)).sum(-1).double()
    return total / len(windows)


def parts(length: int) -> list[tuple[int, int]]:
    """Returns the ranges of positions: the first tokens, then as many again, and so on."""
    ends = [SHORT]
    while ends[-1] < length:
        ends.append(min(2 * ends[-1], length))
    return list(zip([0, *ends[:-1]], ends, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(bundled_model()))
    parser.add_argument("--lengths", type=int, nargs="*", default=[2048, 8192, 32768])
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--samples", type=int, default=2, help="calibration windows of full length")
    parser.add_argument("--held-out", type=int, default=1, help="windows that are compared")
    parser.add_argument("--max-memory", default="", help="budget of a run, such as 2GB")
    args = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {args.model}")
    for length in args.lengths:
        with tempfile.TemporaryDirectory() as scratch:
            measure(args, length, Path(scratch))


def measure(args: argparse.Namespace, length: int, scratch: Path) -> None:
    """Prints the lines of one length."""
    model = lengthened(local_folder(args.model), length, scratch)
    base, tokenizer = rw.load(model, dtype=torch.float32)
    special = special_tokens(tokenizer)
    size = length - special.count
    text = read_text("python-stdlib")[: 8 * length * args.held_out]
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    windows = [special.around(ids[i * size : (i + 1) * size]) for i in range(args.held_out)]
    assert all(len(window) == length for window in windows)
    for seq_len in (SHORT, length):
        samples = args.samples * length // seq_len
        out = scratch / f"out-{seq_len}"
        run = quantize(model, out, seq_len, samples, args.bits, args.max_memory)
        kl = kl_by_position(base, rw.load(out, dtype=torch.float32)[0], windows)
        shown = "  ".join(f"{a}-{b}: {float(kl[a:b].mean()):.6f}" for a, b in parts(length))
        print(
            f"{length} tokens, {samples} windows of {seq_len}: {run['seconds']:.0f} s, "
            f"{run['mode']}, peak {run['peak'] / 1e9:.2f} GB (planned {run['planned'] / 1e9:.2f})\n"
            f"    KL by position  {shown}",
            flush=True,
        )


if __name__ == "__main__":
    main()
