"""Pushing sends a checkpoint to the hub, and nothing that says where it was made."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import constants

import roundwise as rw
from roundwise.checkpoint.manifest import read_manifest
from roundwise.errors import CheckpointError, ConfigError, RunError
from roundwise.publish.card import rewrite_card
from roundwise.publish.measurement import Measurement
from roundwise.publish.push import check_push, without_paths
from tests.helpers import contents
from tests.publish.hub import TOKEN, running_hub

# huggingface_hub's own upload of large files.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    with running_hub() as running:
        monkeypatch.setattr(constants, "ENDPOINT", running.endpoint)
        yield running


@pytest.fixture
def checkpoint(quantized, tmp_path):
    """A copy of a checkpoint, with files that are not for others."""
    folder = Path(shutil.copytree(quantized("llama", recipe="textbook"), tmp_path / "mine"))
    (folder / "roundwise-report.html").write_text("a report")
    (folder / ".roundwise").mkdir()
    (folder / ".roundwise" / "journal.jsonl").write_text("{}")
    return folder


def test_a_checkpoint_is_pushed(hub, checkpoint, llama):
    address = rw.push(checkpoint, "me/tiny-4bit", token=TOKEN)
    assert address == f"{hub.endpoint}/me/tiny-4bit"
    assert hub.private == {"me/tiny-4bit": True}
    files = hub.files["me/tiny-4bit"]
    assert {*files} == {
        "config.json", "generation_config.json", "model.safetensors", "quantize_config.json",
        "README.md", "roundwise.json",
    }  # fmt: skip
    for name in ("config.json", "model.safetensors", "README.md"):
        assert files[name] == (checkpoint / name).read_bytes()
    assert 'from_pretrained("me/tiny-4bit")' in files["README.md"].decode()
    everything = b"".join(files.values())
    assert str(llama).encode() not in everything and str(checkpoint).encode() not in everything
    manifest = json.loads(files["roundwise.json"])
    assert manifest["given"]["model"] == llama.name
    assert manifest["files"] == json.loads((checkpoint / "roundwise.json").read_text())["files"]


def test_what_was_measured_is_pushed(hub, checkpoint):
    rewrite_card(checkpoint, measurement=Measurement((20.5, 21.25), 0.0125, 0.975))
    rw.push(checkpoint, "me/tiny-4bit", token=TOKEN)
    card = hub.files["me/tiny-4bit"]["README.md"].decode()
    assert "| perplexity | 20.5000 | 21.2500 |" in card and "value: 21.25" in card


def test_pushing_again_replaces_the_files(hub, checkpoint):
    rw.push(checkpoint, "me/tiny", token=TOKEN, private=False)
    (checkpoint / "generation_config.json").write_text("{}")
    rw.push(checkpoint, "me/tiny", token=TOKEN)
    assert hub.private == {"me/tiny": False}
    assert hub.files["me/tiny"]["generation_config.json"] == b"{}"
    assert len(hub.messages) == 4


def test_what_goes_wrong_is_one_sentence(hub, checkpoint, tmp_path):
    with pytest.raises(RunError, match=r"mine could not be pushed to me/tiny: .*401"):
        rw.push(checkpoint, "me/tiny", token="wrong")
    hub.refuses_commits = True
    with pytest.raises(RunError, match=r"could not be pushed to me/tiny: .*403"):
        rw.push(checkpoint, "me/tiny", token=TOKEN)
    assert hub.files == {"me/tiny": {}}
    with pytest.raises(CheckpointError, match="is not a folder"):
        rw.push(tmp_path / "missing", "me/tiny", token=TOKEN)


@pytest.mark.parametrize("repo", ["tiny", "a/b/c", "me/", "me/a b"])
def test_ids_are_checked_before_anything_is_sent(repo, hub, checkpoint):
    before = contents(checkpoint)
    with pytest.raises(ConfigError, match="is not the id of a repository: write owner/name"):
        rw.push(checkpoint, repo, token=TOKEN)
    assert hub.requests == [] and contents(checkpoint) == before


def test_a_token_is_needed(monkeypatch, tmp_path):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("roundwise.publish.push.get_token", lambda: None)
    with pytest.raises(ConfigError, match="needs a token of the hub: run `hf auth login`"):
        check_push("me/tiny")
    check_push("me/tiny", TOKEN)


def test_places_of_files_are_left_out_of_the_manifest(quantized):
    manifest = read_manifest(quantized("llama", recipe="textbook"))
    calibration = manifest.run.calibration.model_copy(
        update={
            "texts": [["/home/me/secret/notes.txt", "12"]],
            "source": "/home/me/secret/notes.txt",
        }
    )
    run = manifest.run.model_copy(update={"calibration": calibration})
    given = manifest.given.model_copy(
        update={"model": "Qwen/Qwen3-0.6B", "calibration": "/home/me/secret/notes.txt"}
    )
    public = without_paths(manifest.model_copy(update={"run": run, "given": given}))
    assert "secret" not in json.dumps(public.as_json())
    assert public.given.model == "Qwen/Qwen3-0.6B"
    assert public.run.calibration.texts == [["notes.txt", "12"]]


def test_quantize_pushes_its_result_if_asked(text_model, text, tmp_path):
    with running_hub() as hub:
        environment = {
            **os.environ, "HF_ENDPOINT": hub.endpoint, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
        }  # fmt: skip
        line = [
            sys.executable, "-m", "roundwise", "quantize", text_model, tmp_path / "out",
            "--method", "rtn", "--group-size", "32", "--json",
        ]  # fmt: skip

        def run(*options: str) -> subprocess.CompletedProcess[str]:
            return subprocess.run(
                [*map(str, line), *options], env=environment, capture_output=True, text=True
            )

        assert run().returncode == 0 and hub.requests == []
        refused = run("--push", "tiny")
        assert refused.returncode == 2 and "write owner/name" in refused.stderr
        pushed = run("--push", "me/tiny")
        assert pushed.returncode == 0, pushed.stderr
        assert json.loads(pushed.stdout)["pushed_to"] == f"{hub.endpoint}/me/tiny"
        assert "model.safetensors" in hub.files["me/tiny"]
