"""Checks of generated answers, named by the task files; lm-eval imports this module.

`code_runs` runs generated code in a process of its own, with a time limit and without the environment of
the caller. Small models write harmless lines; do not use it on models that you do not trust.
"""

import json
import re
import subprocess
import sys
import tempfile
from typing import Any

SECONDS = 5


def json_is_valid(document: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Returns 1 if the answer holds a JSON object with the keys and values that were asked for."""
    found = re.search(r"\{.*?\}", results[0], re.DOTALL)
    try:
        answer = json.loads(found[0]) if found else None
    except ValueError:
        answer = None
    is_object = isinstance(answer, dict)
    keys = is_object and {*document["expected"]} <= {*answer}
    right = keys and all(
        str(answer[key]).lower() == str(value).lower()
        for key, value in document["expected"].items()
    )
    return {"valid": float(is_object), "has_keys": float(keys), "right": float(right)}


def format_is_followed(document: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Returns 1 if the answer matches the regular expression of the document."""
    answer = results[0].strip()
    return {"followed": float(re.fullmatch(document["pattern"], answer, re.DOTALL) is not None)}


def code_runs(document: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Returns 1 if the completed function is valid Python, and if its assertions hold."""
    # The function ends at the first line that is not indented.
    body = re.split(r"\n(?=\S)", results[0].strip(), maxsplit=1)[0]
    program = f"{document['prompt']} {body}\n\n"
    try:
        compile(program, "answer", "exec")
    except (SyntaxError, ValueError):
        return {"parses": 0.0, "passes": 0.0}
    return {"parses": 1.0, "passes": float(_passes(program + document["test"]))}


def _passes(program: str) -> bool:
    """Runs a program in an empty folder, isolated from this interpreter's settings."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-I", "-c", program]
        try:
            done = subprocess.run(
                command, cwd=folder, env={}, capture_output=True, timeout=SECONDS, check=False
            )
        except subprocess.TimeoutExpired:
            return False
    return done.returncode == 0
