"""Environments of their own, under .venv-peers, made on first use from pinned versions.

One for each peer, and one for roundwise as users install it: what the development tools bring (SciPy,
Triton) is imported by transformers wherever it is found, and takes a hundred megabytes.
"""

import hashlib
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
#: These are clients in the tests too, and pinned there.
REQUIREMENTS = {
    tool: ROOT / "tests" / "clients" / f"requirements-{tool}.txt"
    for tool in ("gptqmodel", "llmcompressor")
}


def python_of(tool: str) -> Path:
    """The interpreter that has `tool`; "roundwise" is as it is now, with nothing that it does not need.

    torch goes first and alone, so that no other package chooses its version or build; then the rest,
    which a peer's file lists completely.
    """
    if tool == "roundwise":
        return _our_python()
    requirements = REQUIREMENTS.get(tool, HERE / f"requirements-{tool}.txt")
    torch = next(
        line for line in requirements.read_text().splitlines() if line.startswith("torch==")
    )
    return _environment(tool, [requirements], [[torch], ["--no-deps", "-r", requirements]])


def _our_python() -> Path:
    names = ["pyproject.toml", "constraints.txt", "CMakeLists.txt"]
    sources = [*(ROOT / name for name in names), *sorted((ROOT / "src").rglob("*.*"))]
    sources = [path for path in sources if path.is_file() and path.suffix != ".pyc"]
    known = ["-c", ROOT / "constraints.txt"]
    return _environment("roundwise", sources, [[*known, "torch"], [*known, ROOT]])


def _environment(name: str, sources: list[Path], installs: list[list[Any]]) -> Path:
    """The interpreter of an environment, made anew when its sources have changed."""
    environment = ROOT / ".venv-peers" / name
    python, stamp = environment / "bin" / "python", environment / "stamp"
    digest = hashlib.sha256()
    for path in sources:
        digest.update(path.read_bytes())
    if stamp.exists() and stamp.read_text().split()[0] == digest.hexdigest():
        return python
    print(f"making {environment} (once)", file=sys.stderr)
    subprocess.run([sys.executable, "-m", "venv", "--clear", environment], check=True)
    install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    for what in installs:
        subprocess.run([*install, *what], check=True)
    stamp.write_text(digest.hexdigest())  # last, so that a stopped installation starts anew
    return python
