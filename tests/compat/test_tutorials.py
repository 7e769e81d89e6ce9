"""Scripts of AutoGPTQ's tutorials, as files, with one changed import; lm-eval and its result files."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import roundwise as rw
from tests.clients.test_lm_eval import TASK

SCRIPTS = Path(__file__).parent / "tutorials"


def run(script: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Runs a script in a process of its own, without network."""
    done = subprocess.run(
        [sys.executable, SCRIPTS / script, *arguments], capture_output=True, text=True, timeout=600,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.fixture(scope="module")
def quantized(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The checkpoint that quantize.py makes, and what it logs."""
    out = tmp_path_factory.mktemp("tutorial") / "tiny-4bit"
    return out, run("quantize.py", tiny, out).stderr


def test_quantize_logs_each_layer(quantized: tuple[Path, str]) -> None:
    out, log = quantized
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert (config["bits"], config["group_size"], config["desc_act"]) == (4, 128, False)
    for block in range(6):
        for kind in ("self_attn.q_proj", "mlp.down_proj"):
            assert re.search(rf"INFO \[roundwise.*layers\.{block}\.{kind}", log), log


def test_load_and_generate(quantized: tuple[Path, str]) -> None:
    first, second = (
        text for text in run("generate.py", quantized[0]).stdout.split("import os") if text.strip()
    )
    assert first.strip()[:20] == second.strip()[:20]


def test_perplexity(quantized: tuple[Path, str], text: Path) -> None:
    said = run("perplexity.py", quantized[0], text).stdout
    model, tokenizer = rw.load(quantized[0], dtype=torch.float32)
    expected = rw.perplexity(
        model, tokenizer, text.read_text(), window=128, stride=64, max_tokens=600
    )
    assert float(said.split()[1]) == pytest.approx(expected.perplexity, rel=1e-3)


def test_generation_speed(quantized: tuple[Path, str]) -> None:
    said = run("speed.py", quantized[0]).stdout
    match = re.fullmatch(r"72 tokens, (\d+\.\d) tokens/s\n", said)
    assert match
    assert float(match[1]) > 1


@pytest.mark.slow
def test_lm_eval_and_its_result_files(
    quantized: tuple[Path, str], tiny: Path, tmp_path: Path
) -> None:
    rows = [
        {"question": "import os\nos.path.", "choices": ["join", "zebra"], "answer": 0},
        {"question": "def f(", "choices": ["zebra", "self"], "answer": 1},
        {"question": "import", "choices": [" os", " and"], "answer": 1},
    ]
    data = tmp_path / "choice.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "choice.yaml").write_text(TASK.format(data=data))
    files = []
    for name, model in (("base", tiny), ("quantized", quantized[0])):
        done = subprocess.run(
            [sys.executable, "-m", "roundwise.evaluation.lm_eval_model", "--model", "hf",
             "--model_args", f"pretrained={model},dtype=float32", "--tasks", "own_choice",
             "--include_path", tmp_path, "--device", "cpu", "--output_path", tmp_path / name],
            capture_output=True, text=True, check=False,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        files += (tmp_path / name).rglob("results_*.json")
    said = run("compare_results.py", *files).stdout.splitlines()
    found: Any = re.fullmatch(r"own_choice +([\d.]+) +([\d.]+) +[+-][\d.]+", said[1])
    assert found, said
    assert float(found[1]) == pytest.approx(2 / 3, abs=0.34)
