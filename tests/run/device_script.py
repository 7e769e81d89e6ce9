"""Quantizes small models on the device of `tests.toy` and on the CPU; prints which results agree.

A process of its own, because torch cannot unregister a device.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.nn.attention import SDPBackend, sdpa_kernel

import roundwise as rw
from roundwise.core.backends import cpp
from roundwise.run.resume import WritePace
from tests.helpers import (
    ARCHITECTURES,
    LLAMA,
    Stop,
    contents,
    journal_blocks,
    random_model,
    windows,
)
from tests.mixtures import MIXTURES
from tests.toy import Backend, toy


def model(name: str) -> Any:
    """A small model with random weights; with one block where a search makes runs slow."""
    torch.manual_seed(0)
    if name == "t5":
        sizes = {"vocab_size": 128, "d_model": 64, "d_kv": 16, "d_ff": 96, "num_heads": 4}
        return transformers.T5ForConditionalGeneration(
            transformers.T5Config(**sizes, num_layers=2, decoder_start_token_id=0)
        )
    if name == "tied":
        one = {**LLAMA, "num_hidden_layers": 1, "tie_word_embeddings": True}
        return random_model(transformers.LlamaConfig(**one))
    config = {**ARCHITECTURES, **MIXTURES}[name].config()
    if name == "llama":
        config.num_hidden_layers = 1
    return random_model(config)


QUICK = {"group_size": 32, "exchange": 2, "grid_candidates": 2}
TEXTBOOK = {"recipe": "textbook", "group_size": 32}
#: Model -> settings, and arguments of the run.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "llama": ({**QUICK, "damp_percent": 0.02}, {"mode": "true_sequential"}),
    "gpt2": ({**QUICK, "sym": False, "desc_act": True}, {"mode": "block"}),
    "tied": ({**TEXTBOOK, "lm_head": True, "rotate": True}, {}),
    "qwen3_moe": (
        TEXTBOOK,
        {"mode": "block", "max_memory": 1},
    ),  # batches are offloaded to the host
    "deepseek_v3": ({**TEXTBOOK, "alpha": 1.0, "experts": "all"}, {"mode": "true_sequential"}),
    "t5": (TEXTBOOK, {}),
    "qwen3": ({**TEXTBOOK, "target_bpw": 6, "target_widths": (4, 8)}, {}),
    "opt": ({"method": "rtn", "group_size": 32}, {}),
}


#: Model -> number of blocks, after how many to stop, after which of them activations are saved, and
#: which blocks are therefore in the journal: all up to the last with saved activations.
STOPPED: dict[str, tuple[int, int, set[int], list[int]]] = {
    "llama": (4, 3, {1}, [0, 1]),
    "never": (3, 2, set(), []),
    "t5": (4, 3, set(), [0, 1]),  # the decoder's blocks need the output of the encoder's last block
}


def stopped(folder: Path, name: str) -> dict[str, Any]:
    """Stops a run on the device after a block and resumes it; returns the journal and the outcome."""
    blocks, count, due, _ = STOPPED[name]
    config = transformers.LlamaConfig(**{**LLAMA, "num_hidden_layers": blocks})
    (model("t5") if name == "t5" else random_model(config)).save_pretrained(folder / name)
    finished: list[int] = []
    WritePace.due = lambda _: len(finished) in due  # type: ignore[method-assign]

    def progress(step: Any) -> None:
        if step.layer is None:
            finished.append(step.block)
            if len(finished) == count:
                raise Stop

    def run(out: Path, device: str, progress: Any = None) -> Any:
        tokens = 16 if name == "llama" else 0  # gradients must be kept for their block as well
        settings = rw.QuantizeConfig(**TEXTBOOK, alpha=1.0, output_tokens=tokens)
        with toy(), sdpa_kernel(SDPBackend.MATH):
            return rw.quantize(
                folder / name, out, settings, windows(), batch_size=2, device=device,
                progress=progress,
            )  # fmt: skip

    out = folder / f"{name}-stopped"
    try:
        run(out, "toy", progress)
    except Stop:
        journal = journal_blocks(out)
    resumed: list[int] = []
    run(out, "toy", lambda step: resumed.append(step.block))
    plain = contents(run(folder / f"{name}-plain", "cpu").output)
    tensors = {n: digest for n, digest in plain.items() if n.endswith(".safetensors")}
    same = all(contents(out)[n] == digest for n, digest in tensors.items())
    return {"journal": journal, "resumed": resumed[0], "same": same and bool(tensors)}


def main(folder: Path) -> dict[str, Any]:
    """Returns, for each case, figures of the result, and if its bytes equal those of the CPU."""
    results: dict[str, Any] = {}
    for name in CASES:
        model(name).save_pretrained(folder / name)
    # The same kernels for both: neither the extension nor fast attention supports the device.
    cpp.load = lambda: (None, cpp.Status(None, "test"))  # type: ignore[assignment]
    texts = windows()
    texts[0] = texts[0][:20]  # padding
    for name, (config, options) in CASES.items():
        with toy(), sdpa_kernel(SDPBackend.MATH):
            runs = [
                rw.quantize(
                    folder / name, folder / f"{name}-{device}", rw.QuantizeConfig(**config),
                    None if config.get("method") == "rtn" else texts,
                    batch_size=2, device=device, **options,
                )
                for device in ("cpu", "toy")
            ]  # fmt: skip
        tensors = [
            {n: digest for n, digest in contents(r.output).items() if n.endswith(".safetensors")}
            for r in runs
        ]
        result, offloaded, Backend.offloaded = runs[1], Backend.offloaded, 0
        results[name] = {
            "device": result.device,
            "same": tensors[0] == tensors[1],
            "peak_device_bytes": result.peak_device_bytes,
            "layers": len(result.layers),
            "offloaded": offloaded,
        }
    (folder / "stopped").mkdir()
    results["stopped"] = {name: stopped(folder / "stopped", name) for name in STOPPED}
    try:
        with toy():
            torch.zeros(2).to("toy") + torch.zeros(2)
    except RuntimeError as error:
        results["mixed"] = str(error)
    results["synchronized"] = Backend.synchronized
    return results


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]))))
