"""The small trained model that comes with roundwise, for demos, tests and first steps offline.

Model names: a local folder, or an id on the Hugging Face hub that is downloaded first.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from huggingface_hub import snapshot_download

from roundwise.errors import CheckpointError


def bundled_model() -> Path:
    """Folder of the tiny Llama: inside an installed package, or in examples/ of a source checkout.

    Raises:
        CheckpointError: it is in neither place.
    """
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "tiny-llama", package.parents[1] / "examples" / "tiny-llama"):
        if (folder / "config.json").exists():
            return folder
    raise CheckpointError(
        "the bundled model is missing from this installation: install roundwise again"
    )


#: Everything a checkpoint is made of; pickled weights and other frameworks' are left out.
PATTERNS = [
    "*.safetensors",
    "*.json",
    "*.txt",
    "*.model",
    "*.jinja",
    "*.md",
    "LICENSE*",
    "*.tiktoken",
]


def local_folder(model: str | os.PathLike[str]) -> Path:
    """The folder of a model, downloaded from the hub if `model` is an id such as Qwen/Qwen3-0.6B.

    Raises:
        CheckpointError: neither a folder nor an id, or the download failed.
    """
    path = Path(model)
    if path.exists():
        return path
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(model)):
        raise CheckpointError(
            f"there is no folder {model}, and it is no model id of the form owner/name"
        )
    try:
        return Path(snapshot_download(str(model), allow_patterns=PATTERNS))
    except Exception as error:  # network, authorisation, unknown id: the library has many kinds
        reason = str(error).strip().split("\n", 1)[0]
        raise CheckpointError(
            f"{model} is no folder here and cannot be downloaded: {reason}"
        ) from error
