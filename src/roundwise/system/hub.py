"""Finds model folders: a local path, an id on the Hugging Face hub, or the bundled tiny Llama.

The bundled model is small and trained; demos, tests and first steps use it offline.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from huggingface_hub import snapshot_download

from roundwise.errors import CheckpointError, first_line


def bundled_model() -> Path:
    """Returns the folder of the tiny Llama, in the installed package or examples/ of a source checkout.

    Raises:
        CheckpointError: the model is in neither place.
    """
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "tiny-llama", package.parents[1] / "examples" / "tiny-llama"):
        if (folder / "config.json").exists():
            return folder
    raise CheckpointError(
        "the bundled model is missing from this installation: reinstall roundwise"
    )


#: Files to download: everything a checkpoint needs, without pickled weights or other frameworks'.
DOWNLOAD_PATTERNS = [
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
    """Returns the folder of a model; downloads it if `model` is a hub id such as Qwen/Qwen3-0.6B.

    Raises:
        CheckpointError: `model` is neither a folder nor an id, or the download failed.
    """
    path = Path(model)
    if path.exists():
        return path
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(model)):
        raise CheckpointError(
            f"there is no folder {model}, and it is not a model id of the form owner/name"
        )
    try:
        return Path(snapshot_download(str(model), allow_patterns=DOWNLOAD_PATTERNS))
    except Exception as error:  # the library raises many types: network, authorisation, unknown id
        reason = first_line(error)
        raise CheckpointError(
            f"{model} is not a local folder and cannot be downloaded: {reason}"
        ) from error
