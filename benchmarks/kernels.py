"""Measures the CPU kernel for packed weights against memory bandwidth and other kernels.

    python benchmarks/kernels.py                       one row: share of bandwidth; prompts
    python benchmarks/kernels.py --against gptqmodel   GPTQModel's kernel too, alternating with ours

Text generation multiplies one row at a time: every weight is read once per token, so memory bandwidth is
the limit. Layers are copied until they exceed every cache, and the bandwidth (a sum over 256 MB) is
measured next to each figure. Bytes count codes and scales. On a shared machine, compare only ratios
within one line. All figures are medians.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peers.environments import python_of

from roundwise import QuantizeConfig
from roundwise.checkpoint.gptq_format import quantization_config
from roundwise.checkpoint.writer import write_json, write_safetensors
from roundwise.core.quantized_weight import WIDTHS, pack
from roundwise.inference.kernels.base import PackedWeight
from roundwise.inference.kernels.cpp import NativeKernel
from roundwise.system.hub import bundled_model

SHAPES = ((4096, 4096), (2048, 8192), (2048, 2048))
GROUP, UNCACHED, ROUNDS = 128, 250e6, 5
LAYER = "model.layers.0.mlp.gate_proj"


def random_weight(
    bits: int,
    in_features: int,
    out_features: int,
    group_size: int = GROUP,
    *,
    act_order: bool = False,
) -> PackedWeight:
    """Returns a symmetric weight with random codes."""
    words, groups = in_features * bits // 32, in_features // group_size
    g_idx = torch.arange(in_features, dtype=torch.int32) // group_size
    zeros = torch.full((out_features, groups), 2 ** (bits - 1) - 1)
    return PackedWeight(
        torch.randint(-(2**31), 2**31 - 1, (words, out_features), dtype=torch.int32),
        pack(zeros, bits).T.contiguous(),
        (torch.rand(groups, out_features) * 0.01).half(),
        g_idx[torch.randperm(in_features)] if act_order else None, bits, 1,
    )  # fmt: skip


def copies(layer: Any, nbytes: float) -> list[Any]:
    """Returns the layer and copies of it, together larger than any cache."""
    return [layer, *(copy.deepcopy(layer) for _ in range(int(UNCACHED / nbytes)))]


def seconds(work: Callable[[Any], Any], layers: list[Any], repeat: int = 3) -> float:
    """Returns the median time of `work` over the layers, called one after another."""
    for layer in layers:
        work(layer)
    times = []
    for layer in layers * repeat:
        begun = time.perf_counter()
        work(layer)
        times.append(time.perf_counter() - begun)
    return statistics.median(times)


def bandwidth(buffer: torch.Tensor) -> float:
    """Returns the read bandwidth in bytes per second."""
    return buffer.nbytes / seconds(lambda b: b.sum(), [buffer], repeat=5)


def torch_products(
    in_features: int, out_features: int
) -> dict[str, tuple[Callable[[Any], Any], list[Any]]]:
    """Returns torch's own products for one row: a dense bfloat16 weight, and its 4-bit kernel."""
    x = torch.randn(1, in_features).bfloat16()
    dense = torch.randn(out_features, in_features).bfloat16()
    codes = torch.randint(0, 16, (out_features, in_features), dtype=torch.int32)
    int4 = torch._convert_weight_to_int4pack_for_cpu(codes, 1)
    scales = torch.rand(in_features // GROUP, out_features, 2).bfloat16()
    return {
        "F.linear bf16": (lambda w: torch.nn.functional.linear(x, w), copies(dense, dense.nbytes)),
        "torch int4": (
            lambda w: torch._weight_int4pack_mm_for_cpu(x, w, GROUP, scales),
            copies(int4, int4.nbytes),
        ),
    }


class GPTQModelKernel:
    """GPTQModel's kernel for the same shape, in a separate process."""

    def __init__(self, folder: Path, in_features: int, out_features: int) -> None:
        write_checkpoint(folder, in_features, out_features)
        script = Path(__file__).parent / "peers" / "run_gptqmodel_kernel.py"
        number = int(UNCACHED / (in_features * out_features / 2)) + 1
        self.process = subprocess.Popen(
            [python_of("gptqmodel"), script, folder, LAYER, str(number)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        self.name = self._read()

    def _read(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline().strip()
        if not line:
            sys.exit(f"gptqmodel failed with exit code {self.process.wait()}")
        return line

    def seconds(self) -> float:
        """Returns the median time of a product with one row."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return float(self._read())


def write_checkpoint(folder: Path, hidden: int, intermediate: int) -> None:
    """Writes a Llama of one block with random codes, so that GPTQModel can load this shape."""
    heads = hidden // 128
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16",
        "hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": 1,
        "num_attention_heads": heads, "num_key_value_heads": heads, "vocab_size": 512,
        "quantization_config": quantization_config(QuantizeConfig(), true_sequential=True),
    }  # fmt: skip
    shapes = dict.fromkeys((f"self_attn.{n}_proj" for n in "qkvo"), (hidden, hidden))
    shapes |= {"mlp.gate_proj": (hidden, intermediate), "mlp.up_proj": (hidden, intermediate)}
    shapes |= {"mlp.down_proj": (intermediate, hidden)}
    norm = torch.ones(hidden, dtype=torch.bfloat16)
    table = torch.randn(512, hidden).bfloat16()
    tensors = {"model.embed_tokens.weight": table, "lm_head.weight": table.clone()}
    tensors |= {"model.norm.weight": norm}
    for name in ("input_layernorm", "post_attention_layernorm"):
        tensors[f"model.layers.0.{name}.weight"] = norm.clone()
    for name, shape in shapes.items():
        weight = random_weight(4, *shape)
        for part in ("qweight", "qzeros", "scales"):
            tensors[f"model.layers.0.{name}.{part}"] = getattr(weight, part)
        tensors[f"model.layers.0.{name}.g_idx"] = weight.channel_groups().to(torch.int32)
    folder.mkdir(parents=True)
    for file in bundled_model().glob("tokenizer*"):  # GPTQModel loads no checkpoint without them
        shutil.copy(file, folder)
    write_json(folder / "config.json", config)
    write_safetensors(folder / "model.safetensors", tensors)


def one_row(against: bool, scratch: Path) -> None:
    """Prints the table of products with one row."""
    buffer = torch.ones(64 << 20)
    print("\n| shape | bits | ms | GB/s | share of read bandwidth | times faster than: |")
    print("|---|---|---|---|---|---|")
    for (in_features, out_features), bits in itertools.product(SHAPES, WIDTHS):
        x = torch.randn(1, in_features).bfloat16()
        nbytes = in_features * out_features * bits / 8 + in_features // GROUP * out_features * 2
        ours = copies(NativeKernel(random_weight(bits, in_features, out_features)), nbytes)
        products = torch_products(in_features, out_features) if bits == 4 else {}
        peer = None
        if against and bits == 4:
            folder = scratch / f"{in_features}x{out_features}"
            peer = GPTQModelKernel(folder, in_features, out_features)
        mine, shares = [], []
        ratios: dict[str, list[float]] = {}
        for _ in range(ROUNDS):
            limit = bandwidth(buffer)
            mine.append(seconds(lambda kernel: kernel(x), ours))  # noqa: B023
            shares.append(nbytes / mine[-1] / limit)
            for name, (work, layers) in products.items():
                ratios.setdefault(name, []).append(seconds(work, layers) / mine[-1])
            if peer is not None:
                ratios.setdefault(peer.name, []).append(peer.seconds() / mine[-1])
        median = statistics.median(mine)
        faster = ", ".join(f"{name} {statistics.median(r):.2f}" for name, r in ratios.items())
        print(
            f"| {in_features} x {out_features} | {bits} | {median * 1e3:.3f} | "
            f"{nbytes / median / 1e9:.1f} | {statistics.median(shares):.0%} | {faster} |",
            flush=True,
        )


def many_rows() -> None:
    """Prints the table of products with the rows of a prompt, against a dense bfloat16 weight."""
    in_features = out_features = 4096
    dense = torch.randn(out_features, in_features).bfloat16()
    print("\n| rows | bits | ms | GFLOPS | F.linear bf16, ms | ratio |")
    print("|---|---|---|---|---|---|")
    for rows, bits in itertools.product((4, 16, 128, 512), WIDTHS):
        x = torch.randn(rows, in_features).bfloat16()
        kernel = NativeKernel(random_weight(bits, in_features, out_features))
        mine, theirs = [], []
        for _ in range(ROUNDS):
            mine.append(seconds(lambda k: k(x), [kernel]))  # noqa: B023
            theirs.append(seconds(lambda w: torch.nn.functional.linear(x, w), [dense]))  # noqa: B023
        ratio = statistics.median(t / m for t, m in zip(theirs, mine, strict=True))
        ours, dense_time = statistics.median(mine), statistics.median(theirs)
        speed = 2 * rows * in_features * out_features / ours / 1e9
        print(
            f"| {rows} | {bits} | {ours * 1e3:.2f} | {speed:.0f} | {dense_time * 1e3:.2f} | "
            f"{ratio:.2f} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--against", choices=["gptqmodel"])
    args = parser.parse_args()
    print(json.dumps({"torch": torch.__version__, "threads": torch.get_num_threads()}))
    with tempfile.TemporaryDirectory() as scratch:
        one_row(args.against is not None, Path(scratch))
    many_rows()


if __name__ == "__main__":
    main()
