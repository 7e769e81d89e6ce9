"""Measures the peak memory of quantizing Llamas; it should not grow with the number of blocks.

    python benchmarks/memory.py                   1.2B and 2.4B parameters (twice as many blocks)
    python benchmarks/memory.py --recipe textbook the same with GPTQ as published (much faster)
    python benchmarks/memory.py --shape 7b        all blocks of a model of 7B shape
    python benchmarks/memory.py --shape 8b --device cuda --samples 128 --seq-len 2048 --batch-size 4
                                                  the shape of Llama 3.1 8B on a GPU, with times by phase

The models have random bfloat16 weights in shards, written block by block. Each run is a separate
process. Its peak memory is read from the kernel (VmHWM); the memory of the interpreter with torch
imported is subtracted.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers

from roundwise.checkpoint.writer import write_json, write_safetensors

SHAPES = {
    "1.2b": {"hidden": 2048, "intermediate": 5632, "blocks": 26, "heads": 32, "kv_heads": 4},
    "2.4b": {"hidden": 2048, "intermediate": 5632, "blocks": 52, "heads": 32, "kv_heads": 4},
    "8b": {"hidden": 4096, "intermediate": 14336, "blocks": 32, "heads": 32, "kv_heads": 8},
    "7b": {"hidden": 4096, "intermediate": 11008, "blocks": 32, "heads": 32, "kv_heads": 32},
}
VOCABULARY = 32000

CHILD = """
import json, sys
def status(field):
    line = next(l for l in open("/proc/self/status") if l.startswith(field + ":"))
    return int(line.split()[1]) * 1024
import torch
base = status("VmRSS")
import random
import roundwise as rw
model, out, recipe, device = sys.argv[1:5]
samples, length, batch = map(int, sys.argv[5:])
draw = random.Random(0)
windows = [[draw.randrange(32000) for _ in range(length)] for _ in range(samples)]
limits = {"samples": samples, "seq_len": length, "batch_size": batch, "device": device}
result = rw.quantize(model, out, rw.QuantizeConfig(recipe=recipe), windows, **limits)
peak = status("VmHWM")
print(json.dumps({"base": base, "peak": peak, "seconds": result.seconds, "mode": result.mode,
                  "phases": result.phases, "on_device": result.peak_device_bytes}))
"""


def write_model(
    folder: Path, hidden: int, intermediate: int, blocks: int, heads: int, kv_heads: int
) -> int:
    """Writes a Llama with random weights and returns its number of parameters."""
    config = transformers.LlamaConfig(
        hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=blocks,
        num_attention_heads=heads, num_key_value_heads=kv_heads, vocab_size=VOCABULARY,
        max_position_embeddings=2048, tie_word_embeddings=False, dtype="bfloat16",
    )  # fmt: skip
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    weight_map: dict[str, str] = {}
    total = 0

    def shard(number: int, shapes: dict[str, tuple[int, ...]]) -> None:
        nonlocal total
        tensors = {}
        for name, shape in shapes.items():
            scale = 0.02 if len(shape) == 2 else 0.0
            tensors[name] = torch.randn(shape, generator=generator).mul_(scale).bfloat16()
            if len(shape) == 1:
                tensors[name] += 1
            total += tensors[name].numel()
        file = f"model-{number:05d}-of-{blocks + 1:05d}.safetensors"
        write_safetensors(folder / file, tensors, sync=False)
        weight_map.update(dict.fromkeys(tensors, file))

    kv = hidden // heads * kv_heads
    for block in range(blocks):
        prefix = f"model.layers.{block}."
        shapes: dict[str, tuple[int, ...]] = {
            "self_attn.q_proj.weight": (hidden, hidden),
            "self_attn.k_proj.weight": (kv, hidden),
            "self_attn.v_proj.weight": (kv, hidden),
            "self_attn.o_proj.weight": (hidden, hidden),
            "mlp.gate_proj.weight": (intermediate, hidden),
            "mlp.up_proj.weight": (intermediate, hidden),
            "mlp.down_proj.weight": (hidden, intermediate),
            "input_layernorm.weight": (hidden,),
            "post_attention_layernorm.weight": (hidden,),
        }
        shard(block + 1, {prefix + name: shape for name, shape in shapes.items()})
    ends: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCABULARY, hidden),
        "lm_head.weight": (VOCABULARY, hidden),
        "model.norm.weight": (hidden,),
    }
    shard(blocks + 1, ends)
    index = {"metadata": {"total_size": 2 * total}, "weight_map": weight_map}
    write_json(folder / "model.safetensors.index.json", index)
    return total


def measure(shape: str, args: argparse.Namespace, scratch: Path) -> float:
    """Writes, quantizes and deletes one model, prints a line, and returns the peak above torch in MB."""
    recipe, blocks, samples, length = args.recipe, args.blocks, args.samples, args.seq_len
    source, out = scratch / f"model-{shape}", scratch / f"out-{shape}"
    source.mkdir()
    sizes = SHAPES[shape] | ({"blocks": blocks} if blocks else {})
    parameters = write_model(source, **sizes)
    begun = time.monotonic()
    arguments = [str(source), str(out), recipe, args.device]
    arguments += [str(number) for number in (samples, length, args.batch_size)]
    done = subprocess.run(
        [sys.executable, "-c", CHILD, *arguments], check=True, capture_output=True, text=True
    )
    result = json.loads(done.stdout.splitlines()[-1])
    above = (result["peak"] - result["base"]) / 1e6
    print(
        f"{shape}: {parameters / 1e9:.2f}B parameters, {sizes['blocks']} blocks, "
        f"{samples} x {length} tokens, {recipe}, mode {result['mode']}: peak {above:.0f} MB above torch "
        f"({result['peak'] / 1e6:.0f} MB in total), {result['seconds']:.0f} s "
        f"({result['seconds'] / sizes['blocks']:.1f} s per block), "
        f"{time.monotonic() - begun:.0f} s wall",
        flush=True,
    )
    if result["on_device"] is not None:
        phases = ", ".join(f"{name} {seconds:.1f}" for name, seconds in result["phases"].items())
        print(f"{result['on_device'] / 1e6:.0f} MB on {args.device}; seconds: {phases}", flush=True)
    shutil.rmtree(source)
    shutil.rmtree(out)
    return above


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, action="append")
    parser.add_argument("--recipe", choices=["best", "textbook"], default="best")
    parser.add_argument(
        "--blocks", type=int, default=0, help="number of blocks, instead of the shape's"
    )
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--scratch", type=Path, help="folder for the models (needs disk space of their size)"
    )
    args = parser.parse_args()
    print(
        f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}, transformers {transformers.__version__}, "
        f"Python {platform.python_version()}"
    )
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        shapes = args.shape or ["1.2b", "2.4b"]
        peaks = [measure(shape, args, Path(scratch)) for shape in shapes]
    if not args.shape:
        print(f"twice the blocks: {peaks[1] / peaks[0] - 1:+.1%} peak memory")


if __name__ == "__main__":
    main()
