"""Measures the generation speed of llama.cpp for a Llama with random weights in Q4_0.

    python run_llamacpp.py SHAPE.json FILE.gguf PROMPT_TOKENS NEW_TOKENS THREADS

Needs an interpreter with llama-cpp-python and gguf. SHAPE has the keys hidden, intermediate, blocks,
heads, kv_heads and vocabulary. Writes FILE if it is missing. Prints one JSON object for each line read
from stdin: tokens per second of the prompt and of generation, and the peak memory so far.
"""

import json
import os
import sys
import time
from pathlib import Path

import gguf
import numpy as np
from peak import peak

draw = np.random.default_rng(0)
Q4_0, Q6_K = gguf.GGMLQuantizationType.Q4_0, gguf.GGMLQuantizationType.Q6_K


def q4_0(rows: int, columns: int) -> np.ndarray:
    """Returns random weights in blocks of 32: a float16 scale and 16 bytes of codes."""
    blocks = draw.integers(0, 256, (rows, columns // 32, 18), dtype=np.uint8)
    blocks[:, :, :2] = np.frombuffer(np.float16(0.002).tobytes(), np.uint8)
    return blocks.reshape(rows, -1)


def q6_k(rows: int, columns: int) -> np.ndarray:
    """Returns random weights in blocks of 256: 192 bytes of codes, 16 scales and a float16."""
    blocks = draw.integers(0, 256, (rows, columns // 256, 210), dtype=np.uint8)
    blocks[:, :, 192:208] = 20
    blocks[:, :, 208:] = np.frombuffer(np.float16(0.0001).tobytes(), np.uint8)
    return blocks.reshape(rows, -1)


def write(path: Path, shape: dict) -> None:
    """Writes the model file as llama.cpp's own tool does: the head in Q6_K, the rest in Q4_0."""
    hidden, inner, vocabulary = shape["hidden"], shape["intermediate"], shape["vocabulary"]
    kv = hidden // shape["heads"] * shape["kv_heads"]
    out = gguf.GGUFWriter(path, "llama")
    out.add_context_length(2048)
    out.add_embedding_length(hidden)
    out.add_block_count(shape["blocks"])
    out.add_feed_forward_length(inner)
    out.add_head_count(shape["heads"])
    out.add_head_count_kv(shape["kv_heads"])
    out.add_rope_dimension_count(hidden // shape["heads"])
    out.add_layer_norm_rms_eps(1e-6)
    out.add_vocab_size(vocabulary)
    out.add_tokenizer_model("none")
    out.add_tensor("token_embd.weight", q4_0(vocabulary, hidden), raw_dtype=Q4_0)
    out.add_tensor("output_norm.weight", np.ones(hidden, np.float32))
    out.add_tensor("output.weight", q6_k(vocabulary, hidden), raw_dtype=Q6_K)
    for block in range(shape["blocks"]):
        name = f"blk.{block}."
        for norm in ("attn_norm", "ffn_norm"):
            out.add_tensor(f"{name}{norm}.weight", np.ones(hidden, np.float32))
        for linear, rows, columns in (
            ("attn_q", hidden, hidden), ("attn_k", kv, hidden), ("attn_v", kv, hidden),
            ("attn_output", hidden, hidden), ("ffn_gate", inner, hidden), ("ffn_up", inner, hidden),
            ("ffn_down", hidden, inner),
        ):  # fmt: skip
            out.add_tensor(f"{name}{linear}.weight", q4_0(rows, columns), raw_dtype=Q4_0)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


def main() -> None:
    """Prints one measurement for each line of stdin."""
    shape, path = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    prompt, new, threads = map(int, sys.argv[3:])
    if not path.exists():
        write(path, shape)
    output = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    from llama_cpp import Llama

    model = Llama(
        str(path), n_ctx=prompt + new + 8, n_threads=threads, n_threads_batch=threads,
        n_batch=max(prompt, 32), verbose=False,
    )  # fmt: skip
    for _ in sys.stdin:
        model.reset()
        begun = time.perf_counter()
        model.eval(draw.integers(0, shape["vocabulary"], prompt).tolist())
        middle = time.perf_counter()
        for _ in range(new):
            model.eval([int(draw.integers(0, shape["vocabulary"]))])
        end = time.perf_counter()
        result = {"prompt": prompt / (middle - begun), "generation": new / (end - middle)}
        print(json.dumps({**result, "peak": peak()}), file=output)


if __name__ == "__main__":
    main()
