"""Virtual environments under .venv-peers, created on first use from pinned versions.

There is one for each peer, and one for roundwise as users install it: transformers imports packages that
the development tools bring (SciPy, Triton) if they are installed, which takes 100 MB of memory.
"""

import hashlib
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
#: Peers that are also clients in the tests; their versions are pinned there.
REQUIREMENTS = {
    tool: ROOT / "tests" / "clients" / f"requirements-{tool}.txt"
    for tool in ("gptqmodel", "llamacpp", "llmcompressor")
}


def python_of(tool: str) -> Path:
    """Returns the interpreter that has `tool`; "roundwise": this source tree, no optional packages.

    torch, if the peer needs it, is installed first and alone, so that no other package chooses its
    version or build; then the rest, which a peer's requirements file lists completely.
    """
    if tool == "roundwise":
        return _our_python()
    requirements = REQUIREMENTS.get(tool, HERE / f"requirements-{tool}.txt")
    lines = requirements.read_text().splitlines()
    torch = [[line] for line in lines if line.startswith("torch==")]
    return _environment(tool, [requirements], [*torch, ["--no-deps", "-r", requirements]])


def _our_python() -> Path:
    names = ["pyproject.toml", "constraints.txt", "CMakeLists.txt"]
    sources = [*(ROOT / name for name in names), *sorted((ROOT / "src").rglob("*.*"))]
    sources = [path for path in sources if path.is_file() and path.suffix != ".pyc"]
    known = ["-c", ROOT / "constraints.txt"]
    return _environment("roundwise", sources, [[*known, "torch"], [*known, ROOT]])


def _environment(name: str, sources: list[Path], installs: list[list[Any]]) -> Path:
    """Returns the interpreter of an environment; creates it again when its sources have changed."""
    environment = ROOT / ".venv-peers" / name
    python, stamp = environment / "bin" / "python", environment / "stamp"
    digest = hashlib.sha256()
    for path in sources:
        digest.update(path.read_bytes())
    if stamp.exists() and stamp.read_text().split()[0] == digest.hexdigest():
        return python
    print(f"creating {environment} (once)", file=sys.stderr)
    subprocess.run([sys.executable, "-m", "venv", "--clear", environment], check=True)
    install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    for packages in installs:
        subprocess.run([*install, *packages], check=True)
    stamp.write_text(digest.hexdigest())  # last: an interrupted installation starts again
    return python
