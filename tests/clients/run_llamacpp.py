"""Logits of a GGUF file as llama.cpp computes them on a CPU, for the tests here and benchmarks.

Run by the interpreter of llama-cpp-python and knows nothing of roundwise (see run_gptqmodel.py).

    python run_llamacpp.py MODEL.gguf INPUT.npz OUTPUT.npz
    python run_llamacpp.py --compare INPUT.npz DENSE.gguf MODEL.gguf ...
    python run_llamacpp.py --quantize Q4_0|Q8_0|'mixed Q4_0' DENSE.gguf IMPORTANCE.npz|- OUT.gguf

INPUT holds `input_ids` [windows, length] int64. The first form writes `logits` [windows, length, vocab]
float32 and `argmax` [windows, length]. The second prints for each file its perplexity, and its KL
divergence and top-1 agreement with the first. In the third, IMPORTANCE holds the importance matrix: mean
squares of the inputs of each tensor by its name; with "-" none is used. Matrices are quantized to one
type, the embedding to Q8_0; "mixed" leaves some types of tensors in the blocks to llama.cpp.
"""

import ctypes
import json
import sys
from pathlib import Path

import llama_cpp
import numpy as np

TYPES = {"Q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0, "Q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0}


def quantize(kind: str, dense: Path, importance: Path, out: Path) -> None:
    """llama.cpp's own quantization."""
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread = TYPES[kind.removeprefix("mixed ")], 1
    params.token_embedding_type = params.output_tensor_type = llama_cpp.GGML_TYPE_Q8_0
    params.pure = not kind.startswith("mixed")
    if importance != Path("-"):
        with np.load(importance) as arrays:
            matrix = {name: np.ascontiguousarray(arrays[name], np.float32) for name in arrays}
        # The list ends with an entry without a name.
        entries = (llama_cpp.llama_model_imatrix_data * (len(matrix) + 1))()
        for entry, (name, values) in zip(entries, matrix.items(), strict=False):
            entry.name, entry.size = name.encode(), values.size
            entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        params.imatrix = entries
    failed = llama_cpp.llama_model_quantize(str(dense).encode(), str(out).encode(), params)
    if failed:
        raise SystemExit(f"llama.cpp could not quantize {dense}: {failed}")


def load(model: Path, length: int) -> llama_cpp.Llama:
    """A model for windows of some length."""
    # Attention in float32: keys and values in 16 bits would add noise of their own.
    return llama_cpp.Llama(
        str(model), n_ctx=length, n_batch=length, n_threads=1, n_threads_batch=1, logits_all=True,
        verbose=False, type_k=llama_cpp.GGML_TYPE_F32, type_v=llama_cpp.GGML_TYPE_F32,
    )  # fmt: skip


def logits(llm: llama_cpp.Llama, window: np.ndarray) -> np.ndarray:
    """Logits [length, vocab] of one window."""
    llm.reset()
    llm.eval(window.tolist())
    return np.array(llm.scores[: len(window)], np.float32)


def compare(source: Path, *files: Path) -> None:
    """Prints a list with the figures of each file, over all windows."""
    windows = np.load(source)["input_ids"]
    models = [load(file, windows.shape[1]) for file in files]
    sums = np.zeros((len(models), 3))  # negative log-likelihood, KL, agreements
    for window in windows:
        base = likely = None
        for row, llm in zip(sums, models, strict=True):
            values = logits(llm, window).astype(np.float64)
            values -= values.max(1, keepdims=True)
            values -= np.log(np.exp(values).sum(1, keepdims=True))
            if base is None:
                base, likely = values, np.exp(values)
            row[0] -= values[np.arange(len(window) - 1), window[1:]].sum()
            row[1] += (likely * (base - values)).sum()
            row[2] += (base.argmax(1) == values.argmax(1)).sum()
    figures = [
        {
            "perplexity": float(np.exp(nll / (windows.size - len(windows)))),
            "kl": kl / windows.size, "top1": same / windows.size,
        }
        for nll, kl, same in sums.tolist()
    ]  # fmt: skip
    print(json.dumps(figures))


def main() -> None:
    first, *rest = sys.argv[1:]
    if first == "--quantize":
        quantize(rest[0], *map(Path, rest[1:]))
    elif first == "--compare":
        compare(*map(Path, rest))
    else:
        source, target = map(Path, rest)
        windows = np.load(source)["input_ids"]
        llm = load(Path(first), windows.shape[1])
        stacked = np.stack([logits(llm, window) for window in windows])
        np.savez(target, logits=stacked, argmax=stacked.argmax(-1))


if __name__ == "__main__":
    main()
