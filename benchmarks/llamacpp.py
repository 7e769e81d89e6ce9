"""Compares our GGUF files with llama.cpp's own 4 bits of the same size, on a real model in llama.cpp.

    python benchmarks/llamacpp.py --work DIR       the figures of docs/gguf.md; half an hour on one core

Model: SmolLM2-135M-Instruct (peers/published.py). Text: the prose of docstrings (peers/prose.py), 64
windows of 512 tokens for calibration, for llama.cpp's importance matrix too. The template is made by
llama.cpp's own converter, from the source package of llama-cpp-python. In every file the layers of the
blocks are Q4_0 and the embedding is Q8_0; "mixed" is what llama.cpp does by default.

Perplexity, KL divergence to the dense F16 file and top-1 agreement are computed from the logits of
llama.cpp for 12,288 held-out tokens. What is in DIR already is not made again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tarfile
from functools import partial
from pathlib import Path

import gguf
import numpy as np
import torch
from peers.environments import REQUIREMENTS, ROOT, python_of
from peers.evaluator import Evaluator
from peers.prose import write_prose
from peers.published import CACHE, dense_checkpoint
from peers.reader import read_dense
from transformers import AutoConfig, AutoModelForCausalLM

import roundwise as rw
from roundwise.gguf.convert import convert_to_gguf
from roundwise.gguf.file import GgufFile, PlannedTensor
from roundwise.run.environment import platform_info

MODEL, SAMPLES, TOKENS, WINDOW = "smollm2-135m", 64, 12_288, 512
#: Held-out windows whose logits are compared with torch's.
LOGIT_WINDOWS = 2
CLIENT = ROOT / "tests" / "clients" / "run_llamacpp.py"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="folder of all files; 3 GB")
    parser.add_argument("--recipes", nargs="*", default=["best", "textbook"], help="of roundwise")
    parser.add_argument("--groups", type=int, default=32, help="group size")
    parser.add_argument("--seed", type=int, default=0, help="seed of the calibration windows")
    args = parser.parse_args()
    work: Path = args.work
    work.mkdir(parents=True, exist_ok=True)
    dense = dense_checkpoint(MODEL)
    calibration, held_out = write_prose(work)
    evaluator = Evaluator(dense, str(calibration), str(held_out), TOKENS, SAMPLES)
    template = work / "f16.gguf"
    if not template.exists():
        convert_dense(dense, template)
    windows = evaluator.windows(args.seed)
    files = {
        f"roundwise, {recipe}": our_file(dense, template, windows, work, recipe, args.groups)
        for recipe in args.recipes
    }
    importance = work / f"importance-{args.seed}.npz"
    if not importance.exists():
        np.savez(importance, **importance_matrix(dense, windows))
    files |= {
        "llama.cpp": own_file(template, None, work / "own.gguf"),
        "llama.cpp, imatrix": own_file(template, importance, work / f"own-{args.seed}.gguf"),
        "llama.cpp, imatrix, mixed": own_file(
            template, importance, work / f"own-{args.seed}-mixed.gguf", mixed=True
        ),
    }
    np.savez(work / "held-out.npz", input_ids=np.array(evaluator.ids).reshape(-1, WINDOW))
    line = [python_of("llamacpp"), CLIENT, "--compare", work / "held-out.npz", template]
    done = subprocess.run([*line, *files.values()], check=True, stdout=subprocess.PIPE, text=True)
    show(dict(zip(["dense, F16", *files], json.loads(done.stdout), strict=True)), files, template)
    for recipe in args.recipes:
        compare_logits(work / f"{recipe}-{args.groups}", template, evaluator)
    print(f"groups of {args.groups}, seed {args.seed}; {platform_info()}")


def our_file(
    dense: Path, template: Path, windows: list[list[int]], work: Path, recipe: str, groups: int
) -> Path:
    """Returns the GGUF file of the model quantized by roundwise."""
    out = work / f"{recipe}-{groups}"
    file = out.with_suffix(".gguf")
    if not file.exists():
        settings = rw.QuantizeConfig(bits=4, group_size=groups, recipe=recipe)
        rw.quantize(dense, out, settings, windows, samples=SAMPLES, seq_len=WINDOW)
        print(convert_to_gguf(out, file, template=template, rest="q8_0", strict=True))
    return file


def convert_dense(folder: Path, out: Path) -> None:
    """Writes the template with llama.cpp's own converter, which is in a source package."""
    requirement = next(
        line
        for line in REQUIREMENTS["llamacpp"].read_text().splitlines()
        if line.startswith("llama_cpp_python")
    )
    home = CACHE / "llamacpp" / requirement
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    script = "*/vendor/llama.cpp/convert_hf_to_gguf.py"
    if not any(home.glob(script)):
        home.mkdir(parents=True, exist_ok=True)
        download = ["download", "--no-deps", "--no-binary", ":all:", "--dest", home, requirement]
        subprocess.run([*pip, *download], check=True)
        with tarfile.open(next(home.glob("*.tar.gz"))) as archive:
            members = [m for m in archive.getmembers() if _is_converter(m.name)]
            archive.extractall(home, members, filter="data")
    libraries = home / "libraries"  # the converter imports it, though this model does not need it
    if not (libraries / "sentencepiece").exists():
        subprocess.run([*pip, "install", "--target", libraries, "sentencepiece"], check=True)
    command = [
        sys.executable,
        next(home.glob(script)),
        folder,
        "--outtype",
        "f16",
        "--outfile",
        out,
    ]
    environment = os.environ | {"PYTHONPATH": str(libraries)}
    subprocess.run(command, check=True, env=environment, capture_output=True)


def _is_converter(name: str) -> bool:
    inside = name.partition("/vendor/llama.cpp/")[2]
    return inside.startswith(("convert_hf_to_gguf.py", "conversion/", "gguf-py/gguf/"))


def own_file(template: Path, importance: Path | None, out: Path, *, mixed: bool = False) -> Path:
    """Returns the file that llama.cpp itself quantizes to Q4_0.

    Args:
        template: the dense file.
        importance: importance matrix; None: none is used.
        out: the new file.
        mixed: let llama.cpp choose other types for some tensors, as it does by default.
    """
    if not out.exists():
        line = [python_of("llamacpp"), CLIENT, "--quantize", "mixed Q4_0" if mixed else "Q4_0"]
        subprocess.run([*line, template, importance or "-", out], check=True, capture_output=True)
    return out


def importance_matrix(folder: Path, windows: list[list[int]]) -> dict[str, np.ndarray]:
    """Returns the mean square of each input of each tensor, by its GGUF name.

    That is what llama-imatrix computes; the program is not in the package of llama-cpp-python.
    """
    config = AutoConfig.from_pretrained(folder)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    sums: dict[str, torch.Tensor] = {}

    def add(name: str, X: torch.Tensor) -> None:
        sums[name] = sums.get(name, 0) + X.double().square().sum((0, 1))

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            key = f"{names.get_name(name)}.weight"
            module.register_forward_pre_hook(lambda _, args, key=key: add(key, args[0]))
    with torch.no_grad():
        for start in range(0, len(windows), 4):
            model.model(input_ids=torch.tensor(windows[start : start + 4]), use_cache=False)
    tokens = sum(map(len, windows))
    return {name: (total / tokens).float().numpy() for name, total in sums.items()}


def compare_logits(checkpoint: Path, template: Path, evaluator: Evaluator) -> None:
    """Prints how far llama.cpp's logits are from those of the same weights in float32, in torch.

    llama.cpp computes twice: from our blocks, for which it rounds activations to 8 bits, and from the
    same weights in F32. The embedding has 16 bits in both.
    """
    file, plain = (checkpoint.with_name(f"{checkpoint.name}-{kind}.gguf") for kind in ("16", "f32"))
    if not plain.exists():
        file.unlink(missing_ok=True)
        convert_to_gguf(checkpoint, file, template=template)
        decode(file, plain)
    windows = np.array(evaluator.ids).reshape(-1, WINDOW)[:LOGIT_WINDOWS]
    np.savez(checkpoint.with_name("windows.npz"), input_ids=windows)
    model = evaluator.load_dense(read_dense(checkpoint))
    with torch.no_grad():
        expected = model(input_ids=torch.from_numpy(windows), use_cache=False).logits.numpy()
    for name, path in (("from our blocks", file), ("from the same weights in F32", plain)):
        out = checkpoint.with_name("logits.npz")
        line = [python_of("llamacpp"), CLIENT, path, checkpoint.with_name("windows.npz"), out]
        subprocess.run(line, check=True, capture_output=True)
        logits = np.load(out)["logits"]
        error = np.sqrt(np.square(logits - expected).mean()) / expected.std()
        same = (logits.argmax(-1) == expected.argmax(-1)).mean()
        print(
            f"{checkpoint.name}, {name}: root mean square difference {error:.2e} of the logits' "
            f"deviation, top-1 agreement {same:.2%}"
        )


def decode(file: Path, out: Path) -> None:
    """Writes a GGUF file again with all its values in F32, decoded by the `gguf` package."""
    source = GgufFile(file)
    stored = {tensor.name: tensor for tensor in source.reader.tensors}

    def values(name: str) -> torch.Tensor:
        tensor = stored[name]
        decoded = gguf.quants.dequantize(np.asarray(tensor.data), tensor.tensor_type)
        return torch.from_numpy(np.ascontiguousarray(decoded, np.float32))

    tensors = [
        PlannedTensor(name, "F32", tensor.shape, partial(values, name))
        for name, tensor in source.tensors.items()
    ]
    source.write_like(out, tensors, "F32")


def show(figures: dict[str, dict[str, float]], files: dict[str, Path], template: Path) -> None:
    """Prints a row for each file."""
    print(
        "| | bytes | perplexity | KL to the dense file | top-1 agreement |\n|---|---|---|---|---|"
    )
    for name, values in figures.items():
        size = files.get(name, template).stat().st_size
        print(
            f"| {name} | {size:,} | {values['perplexity']:.4f} | {values['kl']:.6f} | "
            f"{values['top1']:.2%} |"
        )


if __name__ == "__main__":
    main()
