"""Loads the tokenizer of a checkpoint; code that comes with it is never run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers

from roundwise.checkpoint.reader import Checkpoint
from roundwise.checkpoint.untrusted import read_json
from roundwise.errors import CheckpointError, RoundwiseError, quoted
from roundwise.model.foreign_errors import foreign_errors

#: Files of which a checkpoint with a tokenizer has at least one.
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "spiece.model",
    "vocab.json", "vocab.txt", "tekken.json",
)  # fmt: skip


def load_tokenizer(checkpoint: Checkpoint) -> Any:
    """Returns transformers' tokenizer of a checkpoint.

    Raises:
        CheckpointError: the checkpoint has none, it needs code of its own, or its files are damaged.
    """
    folder = checkpoint.folder
    # Without any file, transformers would return an empty tokenizer of the model's type.
    if not any((folder / name).exists() for name in TOKENIZER_FILES):
        raise CheckpointError(
            f"{folder} has no usable tokenizer: copy the original model's tokenizer files to its folder"
        )
    code = _own_code(folder)
    what = f"{folder} has no usable tokenizer"
    if code is not None:
        what = (
            f"{folder} has a tokenizer that needs code of its own ({quoted(code)[1:-1]}), which "
            "roundwise never runs: convert it to a tokenizer.json, or use token ids instead of text"
        )
    with foreign_errors(what):
        return transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def _own_code(folder: Path) -> str | None:
    """Returns the class of a tokenizer that comes as code with the checkpoint; None: there is none."""
    try:
        classes = read_json(folder / "tokenizer_config.json").get("auto_map")
    except RoundwiseError:
        return None
    if isinstance(classes, dict):
        classes = classes.get("AutoTokenizer")
    names = classes if isinstance(classes, list) else [classes]
    return next((name for name in names if isinstance(name, str)), None)


def load_processor(checkpoint: Checkpoint) -> Any:
    """Returns transformers' processor of a checkpoint, which encodes texts with pictures or sounds.

    Raises:
        CheckpointError: the checkpoint has none, or its files are damaged.
    """
    with foreign_errors(f"{checkpoint.folder} has no usable processor for pictures or sounds"):
        processor = transformers.AutoProcessor.from_pretrained(
            checkpoint.folder, trust_remote_code=False
        )
    if not isinstance(processor, transformers.ProcessorMixin):  # a tokenizer alone
        raise CheckpointError(
            f"{checkpoint.folder} has no processor for pictures or sounds: copy the original model's "
            "processor files to its folder, or give records of text alone"
        )
    return processor
