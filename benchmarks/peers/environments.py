"""An environment of its own for each peer, under .venv-peers, made on first use from pinned versions."""

import hashlib
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
#: These are clients in the tests too, and pinned there.
REQUIREMENTS = {
    tool: ROOT / "tests" / "clients" / f"requirements-{tool}.txt"
    for tool in ("gptqmodel", "llmcompressor")
}


def python_of(tool: str) -> Path:
    """The interpreter that has `tool`; roundwise is in our own.

    The environment is made anew when its requirements change. torch goes first and alone, so that no
    other package chooses its version or build; then the rest, which the files list completely.
    """
    if tool == "roundwise":
        return Path(sys.executable)
    environment = ROOT / ".venv-peers" / tool
    requirements = REQUIREMENTS.get(tool, HERE / f"requirements-{tool}.txt")
    python, stamp = environment / "bin" / "python", environment / "stamp"
    wanted = hashlib.sha256(requirements.read_bytes()).hexdigest()
    if stamp.exists() and stamp.read_text().split()[0] == wanted:
        return python
    print(f"making {environment} (once)", file=sys.stderr)
    subprocess.run([sys.executable, "-m", "venv", "--clear", environment], check=True)
    install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    torch = next(
        line for line in requirements.read_text().splitlines() if line.startswith("torch==")
    )
    subprocess.run([*install, torch], check=True)
    subprocess.run([*install, "--no-deps", "-r", requirements], check=True)
    stamp.write_text(wanted)  # last, so that a stopped installation starts anew
    return python
