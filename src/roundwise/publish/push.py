"""Pushes a finished checkpoint to the Hugging Face hub, on request only.

The manifest is pushed without the paths of this machine; the report and the timings are not pushed.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, get_token

from roundwise.checkpoint.manifest import MANIFEST, Manifest, read_manifest
from roundwise.checkpoint.reader import Checkpoint
from roundwise.checkpoint.side_files import OWN_FILES, WORK
from roundwise.checkpoint.writer import PARTIAL
from roundwise.errors import ConfigError, RunError, first_line
from roundwise.publish.card import HUB_ID, rewrite_card
from roundwise.system.activity import announce

#: Files that are not pushed as they are.
NOT_PUSHED = [*OWN_FILES, f"{WORK}/*", f"*{PARTIAL}"]


def push(
    folder: str | os.PathLike[str], repo: str, *, private: bool = True, token: str | None = None
) -> str:
    """Pushes a checkpoint to a repository of the Hugging Face hub.

    Args:
        folder: a finished checkpoint; its model card is written again with the repository's name.
        repo: id of the repository, owner/name; it is made if there is none.
        private: a repository that is made here can be seen by its owner only.
        token: access token; None: the one of `hf auth login` or HF_TOKEN.

    Returns:
        The address of the repository.

    Raises:
        CheckpointError: the folder is not a finished checkpoint.
        ConfigError: the id is not valid, or there is no token.
        RunError: the hub refused the files, or cannot be reached.
    """
    path = Path(folder)
    Checkpoint(path)
    check_push(repo, token)
    manifest = read_manifest(path)
    if manifest is not None:
        rewrite_card(path, name=repo)
    api = HfApi(token=token)
    announce(f"pushing to {repo}")
    try:
        url = api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=repo, folder_path=path, ignore_patterns=[*NOT_PUSHED],
            commit_message="Quantized with roundwise",
        )  # fmt: skip
        if manifest is not None:
            text = json.dumps(without_paths(manifest).as_json(), indent=2, ensure_ascii=False)
            operation = CommitOperationAdd(MANIFEST, text.encode())
            api.create_commit(repo, [operation], commit_message="How it was quantized")
    except Exception as error:  # the library raises many types: network, authorisation, limits
        raise RunError(
            f"{path} could not be pushed to {repo}: {first_line(error.__cause__ or error)}; it is kept, "
            "so that roundwise.push can try again"
        ) from error
    return str(url)


def check_push(repo: str, token: str | None = None) -> None:
    """Checks what can be checked before a run whose result is to be pushed; asks no server.

    Raises:
        ConfigError: the id is not valid, or there is no token.
    """
    if HUB_ID.fullmatch(repo) is None:
        raise ConfigError(f"--push {repo!r} is not the id of a repository: write owner/name")
    if (token or get_token()) is None:
        raise ConfigError("--push needs a token of the hub: run `hf auth login` or set HF_TOKEN")


def without_paths(manifest: Manifest) -> Manifest:
    """Returns a manifest without the places of files on this machine: names of texts are kept."""
    run, given = manifest.run, manifest.given
    changes: dict[str, object] = {}
    if run.calibration is not None:
        texts = [[Path(name).name, digest] for name, digest in run.calibration.texts]
        source = ", ".join(Path(part).name for part in run.calibration.source.split(", "))
        calibration = run.calibration.model_copy(update={"texts": texts, "source": source})
        changes["run"] = run.model_copy(update={"calibration": calibration})
    if given is not None:
        text = given.calibration and Path(given.calibration).name
        model = given.model
        if Path(model).exists() or not HUB_ID.fullmatch(model):
            model = Path(model).name
        changes["given"] = given.model_copy(update={"model": model, "calibration": text})
    return manifest.model_copy(update=changes)
