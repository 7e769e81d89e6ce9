"""What the client tests share: checkpoints, held-out tokens, and the clients behind a function."""

import json
import subprocess
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tokenizers import Tokenizer

import roundwise
from roundwise.inference.serving.vllm import supports_this_cpu

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
MODEL = ROOT / "examples" / "tiny-llama"

WINDOWS, LENGTH = 8, 250

Answer = dict[str, NDArray[Any]]
Client = Callable[..., Answer]
Quantize = Callable[..., Path]

_findings = pytest.StashKey[list[str]]()


@pytest.fixture(scope="session")
def windows() -> NDArray[np.int64]:
    """2,000 tokens [windows, length] of text that the tiny model was not trained on.

    These are the files that its recipe holds out (index 7 modulo 20 of the standard library), as
    this Python has them.
    """
    stdlib = Path(sysconfig.get_path("stdlib"))
    left_out = {"site-packages", "test", "tests", "encodings"}
    files = [
        p for p in sorted(stdlib.rglob("*.py")) if not left_out & set(p.relative_to(stdlib).parts)
    ]
    tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    ids: list[int] = []
    for path in files[7::20]:
        text = path.read_text(encoding="utf-8", errors="replace")
        ids += tokenizer.encode(text, add_special_tokens=False).ids
        if len(ids) >= WINDOWS * LENGTH:
            break
    return np.array(ids[: WINDOWS * LENGTH], np.int64).reshape(WINDOWS, LENGTH)


@pytest.fixture(scope="session")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Quantize:
    """The tiny model quantized with the given settings; each setting is made once per session."""
    made: dict[str, Path] = {}

    def quantize(**settings: Any) -> Path:
        key = json.dumps(settings, sort_keys=True)
        if key not in made:
            out = tmp_path_factory.mktemp("ours") / "checkpoint"
            config = roundwise.QuantizeConfig(**settings)
            roundwise.quantize(
                MODEL, out, config, calibration="python-stdlib", samples=16, seq_len=256
            )
            made[key] = out
        return made[key]

    return quantize


def _run(client: str, folder: Path, *arguments: str | Path) -> None:
    """Run a client's script in its own interpreter; its complaint becomes ours.

    It runs in a scratch folder, because gptqmodel writes a log where it stands.
    """
    python = ROOT / ".venv-clients" / client / "bin" / "python"
    if not python.exists():
        pytest.fail(f"{client} is not installed: run scripts/test-clients")
    command = [python, HERE / f"run_{client}.py", *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=900)
    if done.returncode != 0:
        raise RuntimeError(f"{client} failed:\n{done.stdout[-2000:]}\n{done.stderr[-8000:]}")


def _evaluator(client: str, tmp_path: Path, windows: NDArray[np.int64]) -> Client:
    def evaluate(checkpoint: Path, *options: str) -> Answer:
        source, target = tmp_path / "input.npz", tmp_path / "output.npz"
        np.savez(source, input_ids=windows)
        _run(client, tmp_path, checkpoint, source, target, *options)
        with np.load(target) as answer:
            return dict(answer)

    return evaluate


@pytest.fixture
def gptqmodel(tmp_path: Path, windows: NDArray[np.int64]) -> Client:
    """What gptqmodel computes for a checkpoint: `logits`, `argmax`, `kernels`."""
    return _evaluator("gptqmodel", tmp_path, windows)


@pytest.fixture
def llmcompressor(tmp_path: Path, windows: NDArray[np.int64]) -> Client:
    """What llm-compressor computes for a checkpoint: `logits`, `packed`."""
    return _evaluator("llmcompressor", tmp_path, windows)


@pytest.fixture
def llamacpp(tmp_path: Path, windows: NDArray[np.int64]) -> Client:
    """What llama.cpp computes for a GGUF file: `logits`, `argmax`."""
    return _evaluator("llamacpp", tmp_path, windows)


@pytest.fixture
def vllm(tmp_path: Path, windows: NDArray[np.int64]) -> Client:
    """What vLLM computes for a checkpoint: `logprobs`, `argmax`."""
    return _evaluator("vllm", tmp_path, windows)


@pytest.fixture(scope="session")
def vllm_kernels() -> None:
    """Skips what asks vLLM for a quantized layer where it has no kernel for the processor."""
    if not supports_this_cpu():
        pytest.skip("vLLM's kernels for quantized layers on CPUs need AVX-512")


@pytest.fixture
def gptqmodel_quantizes(tmp_path: Path, windows: NDArray[np.int64]) -> Quantize:
    """The tiny model as gptqmodel itself quantizes and saves it."""

    def quantize(**settings: Any) -> Path:
        source, config, out = (tmp_path / n for n in ("input.npz", "config.json", "theirs"))
        np.savez(source, input_ids=windows)
        config.write_text(json.dumps(settings))
        _run("gptqmodel", tmp_path, "--quantize", config, MODEL, source, out)
        return out

    return quantize


@pytest.fixture
def finding(request: pytest.FixtureRequest) -> Iterator[Callable[[str], None]]:
    """Keep a line for the end of the run: a passing test should show its numbers too."""
    lines = request.config.stash.setdefault(_findings, [])
    yield lambda line: lines.append(f"{request.node.name:55s} {line}")


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    if lines := config.stash.get(_findings, []):
        terminalreporter.section("clients against float32 of the dequantized weights")
        terminalreporter.write_line("\n".join(lines))
