"""Logits of a GGUF file as llama.cpp computes them on a CPU, for the tests in this folder.

Run by the interpreter of llama-cpp-python and knows nothing of roundwise (see run_gptqmodel.py).

    python run_llamacpp.py MODEL.gguf INPUT.npz OUTPUT.npz
    python run_llamacpp.py --quantize Q4_0|Q8_0 DENSE.gguf IMPORTANCE.npz OUT.gguf

INPUT holds `input_ids` [windows, length] int64. Writes `logits` [windows, length, vocab] float32 and
`argmax` [windows, length]. IMPORTANCE holds the importance matrix: mean squares of the inputs of each
tensor by its name; without arrays, none is used. The embedding becomes Q8_0.
"""

import ctypes
import sys
from pathlib import Path

import llama_cpp
import numpy as np

TYPES = {
    "Q4_0": (llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0, llama_cpp.GGML_TYPE_Q8_0),
    "Q8_0": (llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0, llama_cpp.GGML_TYPE_Q8_0),
}


def quantize(kind: str, dense: Path, importance: Path, out: Path) -> None:
    """llama.cpp's own quantization, all matrices but the embedding in one type."""
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.token_embedding_type = TYPES[kind]
    params.output_tensor_type = TYPES[kind][1]
    params.pure, params.nthread = True, 1
    with np.load(importance) as arrays:
        matrix = {name: np.ascontiguousarray(arrays[name], np.float32) for name in arrays}
    # The list ends with an entry without a name.
    entries = (llama_cpp.llama_model_imatrix_data * (len(matrix) + 1))()
    for entry, (name, values) in zip(entries, matrix.items(), strict=False):
        entry.name, entry.size = name.encode(), values.size
        entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    if matrix:
        params.imatrix = entries
    failed = llama_cpp.llama_model_quantize(str(dense).encode(), str(out).encode(), params)
    if failed:
        raise SystemExit(f"llama.cpp could not quantize {dense}: {failed}")


def main() -> None:
    if sys.argv[1] == "--quantize":
        quantize(sys.argv[2], *map(Path, sys.argv[3:6]))
        return
    model, source, target = map(Path, sys.argv[1:4])
    windows = np.load(source)["input_ids"]
    # Attention in float32: keys and values in 16 bits would add noise of their own.
    llm = llama_cpp.Llama(
        str(model), n_ctx=windows.shape[1], n_batch=windows.shape[1], n_threads=1,
        n_threads_batch=1, logits_all=True, verbose=False, type_k=llama_cpp.GGML_TYPE_F32,
        type_v=llama_cpp.GGML_TYPE_F32,
    )  # fmt: skip
    logits = []
    for window in windows:
        llm.reset()
        llm.eval(window.tolist())
        logits.append(np.array(llm.scores[: len(window)], np.float32))
    stacked = np.stack(logits)
    np.savez(target, logits=stacked, argmax=stacked.argmax(-1))


if __name__ == "__main__":
    main()
