"""Triton programs as machine code for a GPU that need not be there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

#: `build` compiles one program: types by argument, constants, warps, and which arguments are aligned.
BUILD = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

def build(function, types, constants, warps, aligned):
    names = function.arg_names
    signature = {n: "constexpr" if n in constants else types[n] for n in names}
    attributes = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if aligned(n)}
    source = ASTSource(function, signature, constants, attributes)
    return compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})
"""


def compiles(code: str, cache: Path) -> None:
    """Runs Python code that uses `build`, in a process whose Triton is no interpreter."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(cache)}
    done = subprocess.run(
        [sys.executable, "-c", BUILD + code], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
