"""Loads checkpoints for inference: GPTQ checkpoints of all common tools and versions, and plain ones."""

from __future__ import annotations

import os
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from roundwise.checkpoint.quantization_config import (
    is_packed,
    raw_quantization_config,
    read_quantization_config,
)
from roundwise.checkpoint.reader import INDEX_FILE, SINGLE_FILE, Checkpoint
from roundwise.checkpoint.untrusted import limit_module_count
from roundwise.errors import CheckpointError, ConfigError
from roundwise.inference import import_hooks
from roundwise.model.build import load_config, model_class
from roundwise.model.foreign_errors import foreign_errors
from roundwise.model.tokenizer import load_tokenizer
from roundwise.system.activity import announce
from roundwise.system.hub import local_folder


def load(
    model: str | os.PathLike[str],
    *,
    dtype: torch.dtype | str = "auto",
    device: str | torch.device = "cpu",
) -> tuple[Any, Any]:
    """Loads a checkpoint as a transformers model and its tokenizer.

    Args:
        model: folder, or id on the Hugging Face hub. Quantized in the GPTQ format (v1 or v2, by
            roundwise, GPTQModel or AutoGPTQ) or compressed-tensors, 2 to 8 bit, or not quantized.
        dtype: dtype of activations and of unquantized weights; "auto" is the checkpoint's own.
        device: device to put the model on.

    Returns:
        The model in evaluation mode, and the tokenizer (None if the checkpoint has no usable one).

    Raises:
        CheckpointError: no such model, damaged files, or another quantization format.
    """
    announce(f"loading {Path(model).name}")
    import_hooks.register()  # again: another package may have replaced our quantizer since import
    folder = local_folder(model)
    checkpoint = Checkpoint(folder)
    raw, packed = raw_quantization_config(checkpoint), is_packed(checkpoint.tensors)
    quantization = read_quantization_config(checkpoint) if raw is not None or packed else None
    config = load_config(checkpoint)
    if quantization is not None:
        config.quantization_config = quantization.as_json()
    with tempfile.TemporaryDirectory() as scratch:
        if not (folder / SINGLE_FILE).exists() and not (folder / INDEX_FILE).exists():
            folder = _link_with_standard_name(checkpoint, Path(scratch))
        with (
            foreign_errors(f"{model} cannot be loaded"),
            limit_module_count(len(checkpoint.tensors)),
        ):
            loaded, info = model_class(config).from_pretrained(
                folder, config=config, dtype=dtype, trust_remote_code=False,
                use_safetensors=True, output_loading_info=True,
            )  # fmt: skip
    missing = sorted(info["missing_keys"])  # transformers fills these with random values
    if missing:
        raise CheckpointError(f"{model} is incomplete: it lacks {', '.join(missing[:3])}")
    if torch.device(device) != loaded.device:  # moving to the same device would repack every layer
        loaded.to(device)
    tokenizer = None
    with suppress(
        CheckpointError
    ):  # token ids are enough for a model: `require_tokenizer` says why
        tokenizer = load_tokenizer(checkpoint)
    return loaded.eval(), tokenizer


def require_tokenizer(tokenizer: Any, model: str | os.PathLike[str]) -> None:
    """Fails if `load` returned no tokenizer for a model.

    Args:
        tokenizer: what `load` returned.
        model: folder or hub id of the model.

    Raises:
        CheckpointError: the tokenizer is None; the message says why.
    """
    if tokenizer is None:
        load_tokenizer(Checkpoint(local_folder(model)))


def _link_with_standard_name(checkpoint: Checkpoint, scratch: Path) -> Path:
    """Fills `scratch` with links to the files of a checkpoint whose weight file has another name.

    Returns:
        `scratch`, where transformers finds the weight file.
    """
    for path in checkpoint.folder.iterdir():
        if path.is_file():
            name = SINGLE_FILE if path == checkpoint.files[0] else path.name
            (scratch / name).symlink_to(path.resolve())
    return scratch


def parse_dtype(name: str) -> torch.dtype | str:
    """Returns the torch dtype of a name; "auto" is returned as it is.

    Raises:
        ConfigError: another name.
    """
    dtypes: dict[str, torch.dtype | str] = {
        "auto": "auto", "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16
    }  # fmt: skip
    if name not in dtypes:
        raise ConfigError(f"dtype {name!r} is not supported: use {', '.join(dtypes)}")
    return dtypes[name]
