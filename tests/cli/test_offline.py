"""Nothing is fetched, nobody is told: imports connect to nothing, the whole demo needs no network."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

# Python asks audit hooks before any module, compiled ones included, resolves a name or connects; as a
# sitecustomize it is in every Python process that is started from here.
BLOCK = """
import os, sys

def hook(event, args):
    if event == "socket.getaddrinfo" or (event == "socket.connect" and isinstance(args[1], tuple)):
        with open(os.environ["NETWORK_LOG"], "a") as file:
            file.write(f"{event} {args[1:] if event == 'socket.connect' else args[:2]}\\n")
        raise OSError("the network is blocked")

sys.addaudithook(hook)
"""

IMPORTS = """
import importlib, pkgutil, roundwise
for found in pkgutil.walk_packages(roundwise.__path__, "roundwise."):
    if not found.name.endswith(("__main__", "triton_programs")):
        importlib.import_module(found.name)
import sys
print(len([name for name in sys.modules if name.startswith("roundwise")]))
"""


class Offline:
    """Python processes that cannot reach a network."""

    def __init__(self, folder: Path) -> None:
        self.log = folder / "network.log"
        (folder / "sitecustomize.py").write_text(BLOCK)
        paths = [str(folder), os.environ.get("PYTHONPATH", "")]
        left_out = {"HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"}  # these would hide what is asked for
        self.environment = {k: v for k, v in os.environ.items() if k not in left_out} | {
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "NETWORK_LOG": str(self.log),
        }

    def python(self, *arguments: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *map(str, arguments)], env=self.environment, cwd=self.log.parent,
            capture_output=True, text=True, timeout=500,
        )  # fmt: skip

    def tried(self) -> str:
        return self.log.read_text() if self.log.exists() else ""


@pytest.fixture
def offline(tmp_path: Path) -> Offline:
    return Offline(tmp_path)


def test_the_block_blocks(offline: Offline) -> None:
    ended = offline.python("-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:9/')")
    assert "the network is blocked" in ended.stderr
    assert "socket.getaddrinfo" in offline.tried()
    offline.log.unlink()
    offline.python("-c", "import socket; socket.socket().connect(('127.0.0.1', 9))")
    assert "socket.connect" in offline.tried()


def test_imports_open_no_connection(offline: Offline) -> None:
    ended = offline.python("-c", IMPORTS)
    assert ended.returncode == 0, ended.stderr
    assert int(ended.stdout.splitlines()[-1]) > 100
    assert offline.tried() == ""


@pytest.mark.slow
def test_the_whole_demo_without_a_network(offline: Offline) -> None:
    ended = offline.python("-m", "roundwise", "demo", offline.log.parent / "demo", "--samples", 4)
    assert ended.returncode == 0, ended.stderr
    assert (offline.log.parent / "demo" / "gptq-4bit" / "config.json").exists()
    assert offline.tried() == ""
