"""Runs on an accelerator: one that is written in Python, and a GPU if there is one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import roundwise as rw
from roundwise.core.hessian import Hessian, add_moment
from roundwise.errors import ConfigError
from roundwise.system.device import free_memory
from roundwise.verify import audit
from tests.helpers import windows
from tests.run.device_script import CASES, STOPPED
from tests.toy import SETUP

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The results that `device_script` prints."""
    if SETUP is None:
        pytest.skip("this version of torch has no devices written in Python")
    done = subprocess.run(
        [sys.executable, "-m", "tests.run.device_script", str(tmp_path_factory.mktemp("toy"))],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    results: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return results


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_run_on_a_device_equals_one_on_the_cpu(ran: dict[str, Any], name: str) -> None:
    result = ran[name]
    assert result["same"]
    assert result["device"] == "toy"
    assert result["layers"] > 0
    assert result["peak_device_bytes"] == 123456
    assert (result["offloaded"] > 0) == (name == "qwen3_moe")


@pytest.mark.slow
@pytest.mark.parametrize("name", STOPPED)
def test_a_stopped_run_resumes_after_the_last_recorded_block(
    ran: dict[str, Any], name: str
) -> None:
    result, expected = ran["stopped"][name], STOPPED[name][-1]
    assert result["journal"] == expected
    assert result["resumed"] == len(expected)
    assert result["same"]


@pytest.mark.slow
def test_the_device_refuses_what_a_gpu_refuses(ran: dict[str, Any]) -> None:
    assert "on the CPU in one operation" in ran["mixed"]
    assert ran["synchronized"] > 100  # phases end when the device is done


def test_an_unknown_device_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="device 'gpu' is not known: use auto, cpu or cuda"):
        rw.quantize("nowhere", tmp_path / "out", device="gpu")
    assert not (tmp_path / "out").exists()


@needs_cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_half_precision_products_are_summed_in_float32(dtype: torch.dtype) -> None:
    cuda = torch.device("cuda")
    x = torch.randn(4096, 640).to(dtype)
    hessian = Hessian(640, device=cuda)
    hessian.add(x.to(cuda))
    exact = x.double().T @ x.double() / len(x)
    torch.testing.assert_close(hessian.mean().cpu().double(), exact, rtol=2e-5, atol=2e-5)
    total = torch.zeros(640, 640, device=cuda)
    add_moment(total, x.to(cuda), x.to(cuda))
    torch.testing.assert_close(total.cpu().double() / len(x), exact, rtol=2e-5, atol=2e-5)


@needs_cuda
@pytest.mark.parametrize("recipe", ["textbook", "best"])
@pytest.mark.parametrize("mode", ["true_sequential", "block"])
def test_a_gpu_gives_equal_errors(llama: Path, tmp_path: Path, mode: Any, recipe: str) -> None:
    config = rw.QuantizeConfig(group_size=32, recipe=recipe)
    errors = []
    for device in ("cpu", "cuda"):
        result = rw.quantize(llama, tmp_path / device, config, windows(), mode=mode, device=device)
        audit(tmp_path / device, against=llama).raise_on_failure()
        errors.append([layer["relative_error"] for layer in result.layers])
    assert result.peak_device_bytes
    assert free_memory(torch.device("cuda")) > 0
    torch.testing.assert_close(
        torch.tensor(errors[0]), torch.tensor(errors[1]), rtol=0.1, atol=1e-5
    )
