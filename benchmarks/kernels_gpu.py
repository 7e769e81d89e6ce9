"""Measures the GPU kernel for packed weights against memory bandwidth, bfloat16 and Marlin.

    python benchmarks/kernels_gpu.py                   all shapes, rows and widths
    python benchmarks/kernels_gpu.py --bits 4 --rows 1 16
    python benchmarks/kernels_gpu.py --against marlin  vLLM's kernel too, if vllm is installed
    python benchmarks/kernels_gpu.py --json figures.json

Needs a CUDA device; without one, the exit code is 2. Layers are copied until they exceed the L2
cache. Products with all copies are captured in one CUDA graph; a time is the median over its
replays, divided by the number of copies, as in a model that runs with CUDA graphs. `read` is the
speed at which packed bytes (codes, scales, zero points) are read, as a share of the measured
bandwidth; it is meaningful for few rows. `bf16` is the time of F.linear divided by that of the
kernel: above 1, the kernel is faster; `marlin` is the same for vLLM's kernel. Every product is
checked against float64 before it is timed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from roundwise.core.quantized_weight import WIDTHS, pack
from roundwise.inference.kernels.base import PackedWeight
from roundwise.inference.kernels.triton import TritonKernel

#: [in, out] of each layer.
SHAPES = ((4096, 4096), (2048, 8192), (8192, 8192), (4096, 14336))
ROWS = (1, 4, 16, 128, 512, 4096)
GROUP, REPLAYS = 128, 20
#: Bytes of all copies of a layer: several times the L2 cache of any GPU (H200: 60 MB).
UNCACHED = 512e6

Product = Callable[[torch.Tensor], torch.Tensor]


def random_weight(bits: int, channels: int, outputs: int) -> PackedWeight:
    """Returns a symmetric weight with random codes and groups of 128, on the device."""
    words, groups = channels * bits // 32, channels // GROUP
    zeros = torch.full((outputs, groups), 2 ** (bits - 1) - 1)
    return PackedWeight(
        torch.randint(-(2**31), 2**31 - 1, (words, outputs), dtype=torch.int32, device="cuda"),
        pack(zeros, bits).T.contiguous().cuda(),
        (torch.rand(groups, outputs, device="cuda") * 0.01).half(),
        None, bits, 1,
    )  # fmt: skip


def packed_bytes(weight: PackedWeight) -> int:
    """Returns the number of bytes that one product reads."""
    return sum(t.nbytes for t in (weight.qweight, weight.qzeros, weight.scales))


def copies(make: Callable[[], Any], nbytes: int) -> list[Any]:
    """Returns enough objects from `make` to exceed every cache, at least two."""
    return [make() for _ in range(max(2, int(UNCACHED / nbytes)))]


def microseconds(calls: list[Callable[[], Any]]) -> float:
    """Returns the median time of one call when all calls are captured in one CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(REPLAYS + 3):
        begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begun.record()
        graph.replay()
        ended.record()
        torch.cuda.synchronize()
        times.append(begun.elapsed_time(ended) * 1000 / len(calls))
    return statistics.median(times[3:])


def bandwidth() -> float:
    """Returns the read bandwidth in bytes per second: a sum over memory larger than any cache."""
    buffer = torch.ones(2**30, device="cuda")
    return buffer.nbytes / microseconds([buffer.sum] * 4) * 1e6


def timed(products: list[Product], rows: int, channels: int) -> float:
    """Returns the microseconds of a product with rows of bfloat16, over all copies."""
    x = torch.randn(rows, channels, device="cuda").bfloat16()
    return microseconds([lambda p=p: p(x) for p in products])


def error(product: Product, weight: PackedWeight, rows: int) -> float:
    """Returns the relative error of a product with the weight, against float64."""
    x = torch.randn(rows, weight.in_features, device="cuda").bfloat16()
    true = x.double() @ weight.dequantize(torch.float64)
    return float((product(x).double() - true).norm() / true.norm())


def marlin(weight: PackedWeight) -> Product:
    """Returns the product of vLLM's kernel with the same weight: 4 and 8 bits, symmetric."""
    from vllm import _custom_ops as ops
    from vllm.model_executor.layers.quantization.utils import marlin_utils as utils
    from vllm.scalar_type import scalar_types

    device = weight.qweight.device
    channels, outputs = weight.in_features, weight.out_features
    empty = torch.empty(0, dtype=torch.int32, device=device)
    words = ops.gptq_marlin_repack(weight.qweight, empty, channels, outputs, weight.bits)
    scales = utils.marlin_permute_scales(weight.scales.bfloat16(), channels, outputs, GROUP)
    workspace = utils.marlin_make_workspace_new(device)
    kind = {4: scalar_types.uint4b8, 8: scalar_types.uint8b128}[weight.bits]
    return lambda x: utils.apply_gptq_marlin_linear(
        input=x, weight=words, weight_scale=scales, weight_zp=empty, g_idx=empty,
        g_idx_sort_indices=empty, workspace=workspace, wtype=kind,
        output_size_per_partition=outputs, input_size_per_partition=channels, is_k_full=True,
    )  # fmt: skip


def measured(
    bits: int, shape: tuple[int, int], rows: int, against: str | None, dense: float, speed: float
) -> dict[str, Any]:
    """Returns the figures of one line of the table."""
    channels, outputs = shape
    weight = random_weight(bits, channels, outputs)
    nbytes = packed_bytes(weight)
    kernel = TritonKernel(weight)
    kernel_error = error(kernel, weight, rows)
    if not kernel_error < 4e-3:  # rounding the result to bfloat16 gives 1.7e-3
        sys.exit(f"{bits} bits, {shape}, {rows} rows: relative error {kernel_error:.1e}")
    others = copies(lambda: TritonKernel(random_weight(bits, channels, outputs)), nbytes)
    time = timed([kernel, *others], rows, channels)
    line = {
        "bits": bits, "in": channels, "out": outputs, "rows": rows, "microseconds": time,
        "read": nbytes / time * 1e6 / speed, "bf16": dense / time, "error": kernel_error,
    }  # fmt: skip
    if against == "marlin" and bits in (4, 8):
        del others
        peers = copies(lambda: marlin(random_weight(bits, channels, outputs)), nbytes)
        line["marlin_error"] = error(marlin(weight), weight, rows)
        line["marlin"] = timed(peers, rows, channels) / time
    return line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--bits", type=int, nargs="+", choices=WIDTHS, default=list(WIDTHS))
    parser.add_argument("--rows", type=int, nargs="+", default=list(ROWS))
    parser.add_argument("--against", choices=["marlin"])
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("kernels_gpu.py needs a CUDA device, but torch finds none", file=sys.stderr)
        sys.exit(2)
    if options.against == "marlin":
        try:
            marlin(random_weight(4, 1024, 1024))
        except (ImportError, AttributeError, TypeError) as problem:
            print(f"Marlin is unavailable ({problem}): skipped", file=sys.stderr)
            options.against = None
    import triton

    speed = bandwidth()
    machine = {
        "device": torch.cuda.get_device_name(), "torch": torch.__version__,
        "triton": triton.__version__, "read_gb_per_second": speed / 1e9,
    }  # fmt: skip
    print(
        " · ".join(
            f"{k} {v:.0f}" if isinstance(v, float) else f"{k} {v}" for k, v in machine.items()
        )
    )
    print(f"{'in':>6} {'out':>6} {'rows':>5} {'bits':>4} {'µs':>8} {'read':>5} {'bf16':>6}  marlin")
    lines = []
    for channels, outputs in SHAPES:
        for rows in options.rows:
            weights = copies(
                lambda n=outputs, k=channels: torch.randn(n, k, device="cuda").bfloat16(),
                2 * channels * outputs,
            )
            dense = timed([lambda x, w=w: functional.linear(x, w) for w in weights], rows, channels)
            del weights
            for bits in options.bits:
                line = measured(bits, (channels, outputs), rows, options.against, dense, speed)
                lines.append(line)
                peer = f"{line['marlin']:.2f}" if "marlin" in line else ""
                print(
                    f"{channels:6} {outputs:6} {rows:5} {bits:4} {line['microseconds']:8.1f} "
                    f"{line['read']:5.0%} {line['bf16']:6.2f}  {peer}",
                    flush=True,
                )
    if options.json:
        options.json.write_text(json.dumps({"machine": machine, "lines": lines}, indent=1))


if __name__ == "__main__":
    main()
