"""Files of a checkpoint beside its weights: the tokenizer's, chat templates, folders such as 1_Pooling.

All that belongs to the model is carried over to a result. A folder is carried whole or not at all, so
that no part of it is left without the rest. What is left out is named: other copies of the weights,
weights in folders that the model does not refer to, and an adapter beside the weights of a whole model.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from roundwise.checkpoint.untrusted import check_links, file_digest
from roundwise.errors import CheckpointError, quoted
from roundwise.system.activity import announce

#: Files that a run writes about itself: manifest, timings, report.
OWN_FILES = ("roundwise.json", "roundwise-run.json", "roundwise-report.html")
#: Folder in the output of a run for what it needs while it works, and its journal.
WORK, JOURNAL = ".roundwise", "journal.jsonl"
#: Files that are rewritten.
REWRITTEN = ("config.json", "quantize_config.json", "model.safetensors.index.json")
#: Settings of a quantized source, which are not true of its result.
OUTDATED = ("hf_quant_config.json",)
WEIGHTS = (
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx",
)  # fmt: skip
ADAPTER = "adapter_config.json"
#: sentence-transformers: a list of modules, each in the folder that `path` names.
MODULES = "modules.json"
#: Folder of compiled Python files, which Python writes beside a training script, for example.
CACHE = "__pycache__"
#: Most files that a folder may have to be carried over.
MAX_FOLDER_FILES = 1000


@dataclass(frozen=True)
class SideFiles:
    """The files beside the weights of a checkpoint."""

    carried: tuple[Path, ...]
    """Files that belong to the model, also in folders; sorted."""
    left_out: tuple[str, ...]
    """Names of files and folders that are not carried over; a folder ends in a slash. Folders that are
    links are never carried."""


def find_side_files(folder: Path, weights: list[Path]) -> SideFiles:
    """Returns the files beside the weights of a checkpoint.

    Hidden files, compiled Python files and what earlier runs of roundwise wrote are neither carried over
    nor named.

    Args:
        folder: the folder of the checkpoint.
        weights: its weight files.

    Raises:
        CheckpointError: a file is a link out of the folder.
    """
    carried: list[Path] = []
    left_out: list[str] = []
    has_adapter = (folder / ADAPTER).is_file()
    modules = _module_folders(folder)
    for path in sorted(folder.iterdir()):
        name = path.name
        if _is_hidden(name) or name in (*OWN_FILES, *REWRITTEN, *OUTDATED) or path in weights:
            continue
        if path.is_dir():
            files = None if path.is_symlink() else _files_below(path)
            if (path / OWN_FILES[0]).exists() or (files is not None and not files):
                continue
            if files is None or not (name in modules or _is_complete(files)):
                left_out.append(f"{name}/")
            else:
                carried += files
        elif path.is_file():
            is_adapter = has_adapter and name.startswith("adapter_")
            if name.endswith((*WEIGHTS, ".index.json")) or is_adapter:
                left_out.append(name)
            else:
                carried.append(path)
    check_links(folder, carried)
    return SideFiles(tuple(carried), tuple(left_out))


def _is_complete(files: list[Path]) -> bool:
    """Tells whether a folder has no weights, or is an adapter that is kept beside the model."""
    return any(file.name == ADAPTER for file in files) or not any(
        file.name.endswith(WEIGHTS) for file in files
    )


def _files_below(folder: Path) -> list[Path] | None:
    """Returns the files of a folder and its folders, without hidden ones; None: there are too many."""
    files: list[Path] = []
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not _is_hidden(name))
        files += [Path(parent) / name for name in sorted(names) if not _is_hidden(name)]
        if len(files) > MAX_FOLDER_FILES:
            return None
    return [file for file in files if file.is_file()]


def _is_hidden(name: str) -> bool:
    """Tells whether a file or folder is none of the model's."""
    return name.startswith(".") or name == CACHE


def _module_folders(folder: Path) -> set[str]:
    """Returns the folders of the modules that sentence-transformers loads."""
    try:
        modules = json.loads((folder / MODULES).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return set()
    paths = [module.get("path") for module in modules if isinstance(module, dict)]
    return {path.split("/")[0] for path in paths if isinstance(path, str) and path}


def explain_missing_config(folder: Path) -> CheckpointError:
    """Returns the error that says what a folder without config.json is."""
    if (folder / ADAPTER).is_file():
        return CheckpointError(
            f"{folder} is an adapter, not a model: merge it into its base model first "
            "(merge_and_unload of PEFT)"
        )
    journal = folder / WORK / JOURNAL
    if not journal.is_file():
        return CheckpointError(f"{folder} has no config.json, so it is not a model")
    try:
        first, *lines = [json.loads(line) for line in journal.read_bytes().splitlines()]
        # Lists are finished blocks; what follows them are finished files.
        blocks = [block["block"] for line in lines if isinstance(line, list) for block in line]
        count = int(first.get("blocks", 0))
        done = f"{len(blocks)} of {count} blocks are done" if blocks else "no block is done"
        model = str(first["given"]["model"])
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        done, model = "its journal is damaged", "MODEL"
    return CheckpointError(
        f"{folder} is an unfinished run, {done}: resume it with the command that started it, `roundwise "
        f"quantize {quoted(model)[1:-1]} {folder}` and its options"
    )


@dataclass(frozen=True)
class ChangedFiles:
    """Files that are not what the manifest says, one line each."""

    evidence: tuple[str, ...]
    """Weights, their index and configs that were changed, and all files that are missing."""
    notes: tuple[str, ...]
    """Other files that were changed, such as a tokenizer that was saved again."""


def changed_files(
    folder: Path, files: dict[str, str], config_file: str = "config.json"
) -> ChangedFiles:
    """Returns the files that are missing, or whose bytes are not those of the manifest.

    Args:
        folder: the checkpoint.
        files: name -> SHA-256, from the manifest.
        config_file: file that holds its config; an unfinished run has another name for it.
    """
    evidence: list[str] = []
    notes: list[str] = []
    for index, (name, digest) in enumerate(files.items()):
        announce("checking files", index, len(files))
        file = folder / (config_file if name == "config.json" else name)
        if not file.is_file():
            evidence.append(f"{name} is missing")
        elif file_digest(file) != digest:
            is_evidence = "/" not in name and (
                name in REWRITTEN or name.endswith((".safetensors", ".index.json"))
            )
            (evidence if is_evidence else notes).append(f"{name} was changed")
    return ChangedFiles(tuple(evidence), tuple(notes))
