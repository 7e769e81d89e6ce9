"""Loading any checkpoint for inference: GPTQ ones of every tool and age, and plain ones."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers

from roundwise.checkpoint.gptq_format import read_quantization_config
from roundwise.checkpoint.hub import local_folder
from roundwise.checkpoint.reader import SINGLE_FILE, Checkpoint
from roundwise.checkpoint.untrusted import limit_module_count
from roundwise.errors import CheckpointError, ConfigError, RoundwiseError
from roundwise.inference import import_hooks
from roundwise.model.build import load_config, model_class

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "spiece.model",
    "vocab.json", "vocab.txt", "tekken.json",
)  # fmt: skip


def load(
    model: str | os.PathLike[str],
    *,
    dtype: torch.dtype | str = "auto",
    device: str | torch.device = "cpu",
) -> tuple[Any, Any]:
    """Opens a checkpoint as a transformers model and its tokenizer.

    Args:
        model: folder, or id on the Hugging Face hub. Quantized in the GPTQ format (v1 or v2, by
            roundwise, GPTQModel or AutoGPTQ, 2, 3, 4 or 8 bit), or not quantized.
        dtype: what the model computes in; "auto" takes the checkpoint's.
        device: where it goes.

    Returns:
        The model in evaluation mode, and the tokenizer (None if the checkpoint has none).

    Raises:
        CheckpointError: no such model, damaged files, another quantization format.
    """
    import_hooks.register()  # again, should someone have taken the place
    folder = local_folder(model)
    checkpoint = Checkpoint(folder)
    if "quantization_config" in checkpoint.config:
        read_quantization_config(checkpoint)  # refuses other methods, by name
    with tempfile.TemporaryDirectory() as scratch:
        if _is_old(checkpoint):
            folder = _modernised(checkpoint, Path(scratch))
        try:
            kind = model_class(load_config(checkpoint))
            with limit_module_count(len(checkpoint.tensors)):
                loaded, info = kind.from_pretrained(
                    folder, dtype=dtype, trust_remote_code=False, use_safetensors=True,
                    output_loading_info=True,
                )  # fmt: skip
        except RoundwiseError:
            raise
        except Exception as error:  # transformers raises many kinds; all mean the same to a user
            reason = str(error).strip().split("\n", 1)[0]
            raise CheckpointError(f"{model} cannot be loaded: {reason}") from error
    if info["missing_keys"]:  # transformers would make them up
        raise CheckpointError(f"{model} lacks {', '.join(sorted(info['missing_keys'])[:3])}")
    if torch.device(device) != loaded.device:  # else every layer would be repacked to no end
        loaded.to(device)
    return loaded.eval(), _tokenizer(checkpoint.folder)


def _tokenizer(folder: Path) -> Any:
    # Without files, transformers would make up an empty tokenizer of the model's kind.
    if not any((folder / name).exists() for name in TOKENIZER_FILES):
        return None
    try:
        return transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError):
        return None


def _is_old(checkpoint: Checkpoint) -> bool:
    """AutoGPTQ's early layout: settings beside config.json, weights under a name of its own."""
    return "quantization_config" not in checkpoint.config and any(
        name.endswith(".qweight") for name in checkpoint.tensors
    )


def _modernised(checkpoint: Checkpoint, scratch: Path) -> Path:
    """A folder of links that shows an old checkpoint in today's layout."""
    settings = {"quant_method": "gptq", **read_quantization_config(checkpoint)}
    settings.pop("model_file_base_name", None)
    single = len(checkpoint.files) == 1
    for path in checkpoint.folder.iterdir():
        if path.is_file() and path.name != "config.json":
            name = SINGLE_FILE if single and path == checkpoint.files[0] else path.name
            (scratch / name).symlink_to(path.resolve())
    config = {**checkpoint.config, "quantization_config": settings}
    (scratch / "config.json").write_text(json.dumps(config))
    return scratch


def parse_dtype(name: str) -> torch.dtype | str:
    """A dtype by its name; "auto" stays as it is.

    Raises:
        ConfigError: another name.
    """
    known: dict[str, torch.dtype | str] = {
        "auto": "auto", "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16
    }  # fmt: skip
    if name not in known:
        raise ConfigError(f"dtype {name!r} is not supported: use {', '.join(known)}")
    return known[name]
