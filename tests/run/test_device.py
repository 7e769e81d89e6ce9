"""Runs on an accelerator: a made-up one here, a GPU where there is one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import roundwise as rw
from roundwise.core.hessian import Hessian, add_moment
from roundwise.errors import ConfigError
from roundwise.system.device import (
    HOST,
    device_name,
    free_memory,
    keep_embedding_on_host,
    parse_device,
    peak_memory,
    to_device,
)
from roundwise.system.distributed import Ranks
from roundwise.verify import audit
from tests.helpers import windows
from tests.run.device_script import CASES, STOPPED
from tests.toy import SETUP

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `device_script` prints."""
    if SETUP is None:
        pytest.skip("needs a torch that takes devices written in Python")
    done = subprocess.run(
        [sys.executable, "-m", "tests.run.device_script", str(tmp_path_factory.mktemp("toy"))],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("name", CASES)
def test_a_run_on_a_device_makes_what_the_processor_makes(ran: dict[str, Any], name: str) -> None:
    found = ran[name]
    assert found["same"]
    assert found["device"] == "toy"
    assert found["layers"] > 0
    assert found["peak_device_bytes"] == 123456
    assert (found["parked"] > 0) == (name == "qwen3_moe")


@pytest.mark.parametrize("name", STOPPED)
def test_a_stopped_run_goes_on_behind_the_last_block_written_down(
    ran: dict[str, Any], name: str
) -> None:
    found, expected = ran["stopped"][name], STOPPED[name][-1]
    assert found["journal"] == expected
    assert found["resumed"] == len(expected)
    assert found["same"]


def test_the_device_refuses_what_a_gpu_refuses(ran: dict[str, Any]) -> None:
    assert "on the CPU in one operation" in ran["mixed"]
    assert ran["waited"] > 100  # phases end when the device is done


def test_names() -> None:
    assert parse_device("cpu") == HOST
    assert device_name(HOST) == "cpu"
    assert peak_memory(HOST) is None
    for wrong in ("tpu", "meta", "cuda:99"):
        with pytest.raises(ConfigError, match=wrong):
            parse_device(wrong)


def test_an_unknown_device_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="device 'gpu' is not known: use auto, cpu or cuda"):
        rw.quantize("nowhere", tmp_path / "out", device="gpu")
    assert not (tmp_path / "out").exists()


def test_ranks_take_the_devices_of_their_machine_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    class Two:
        @staticmethod
        def device_count() -> int:
            return 2

    monkeypatch.setattr(torch, "get_device_module", lambda _: Two)
    cuda = torch.device("cuda")
    placed = []
    for rank in range(3):
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        placed.append(str(Ranks(rank, 3, 3).local_device(cuda)))
    assert placed == ["cuda:0", "cuda:1", "cuda:0"]
    assert Ranks(0, 3, 3).local_device(torch.device("cuda:1")) == torch.device("cuda:1")
    assert Ranks().local_device(cuda) == cuda
    assert Ranks(0, 3, 3).processes_sharing(cuda) == 2
    assert Ranks(0, 3, 3).processes_sharing(HOST) == 3


def test_tables_stay_on_the_host() -> None:
    table = nn.Embedding(8, 4)
    asked: list[torch.device] = []
    table.register_forward_pre_hook(lambda _, args: asked.append(args[0].device))
    keep_embedding_on_host(table, torch.device("meta"))
    assert table(torch.tensor([1, 2])).device.type == "meta"
    assert table.weight.device == HOST


def test_values_are_moved_however_deep_they_are() -> None:
    x = torch.zeros(2)
    found = to_device({"a": [x, (x, None)], "b": "text"}, torch.device("meta"))
    assert found["a"][0].device.type == found["a"][1][0].device.type == "meta"
    assert (found["a"][1][1], found["b"]) == (None, "text")
    assert to_device(x, HOST) is x


@needs_cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_products_of_half_precision_are_summed_up_in_float32(dtype: torch.dtype) -> None:
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
def test_a_gpu_makes_as_good_a_model(llama: Path, tmp_path: Path, mode: Any, recipe: str) -> None:
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
