"""The mode and the peak memory of a run under a budget; disk space; messages about both."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace

import pytest

import roundwise as rw
from roundwise.checkpoint import sharding
from roundwise.checkpoint.reader import read_header
from roundwise.errors import OutputError
from roundwise.model.streamed import open_streamed_model
from roundwise.plan import memory as plan_memory_module
from roundwise.plan.memory import (
    MemoryPlan,
    bytes_after,
    check_disk_space,
    over_budget_message,
    plan_disk,
    plan_memory,
)
from roundwise.plan.plan import plan
from tests.helpers import windows

CONFIG = rw.QuantizeConfig(group_size=32, recipe="textbook")


def test_more_and_more_is_given_up_for_memory(llama):
    """First the allocator cache, then batches are offloaded to a file; the mode changes last."""
    streamed = open_streamed_model(llama)
    tried, budget = [], None
    for _ in range(5):
        memory = plan_memory(streamed, CONFIG, tokens=1 << 20, batch=64, budget=budget)
        tried.append((memory.mode, memory.offloaded, memory.keeps_freed, memory.fits))
        budget = memory.peak_bytes - 1
    # The last one does not fit: no plan needs less.
    assert tried == [
        ("true_sequential", False, True, True), ("true_sequential", False, False, True),
        ("true_sequential", True, True, True), ("true_sequential", True, False, True),
        ("true_sequential", True, False, False),
    ]  # fmt: skip


def test_parts_add_up_to_the_peak(llama):
    memory = plan_memory(open_streamed_model(llama), CONFIG, tokens=4096, batch=64)
    assert sum(memory.parts.values()) == memory.peak_bytes
    assert memory.parts["libraries"] > 10**6
    assert memory.parts["allocator cache"] > 0


def test_the_default_budget_is_shared_between_processes(llama, monkeypatch):
    monkeypatch.setattr(plan_memory_module, "available_memory", lambda _: 10_000_000_000)
    monkeypatch.setattr(plan_memory_module, "resident_bytes", lambda: 500_000_000)
    streamed = open_streamed_model(llama)
    budgets = [
        plan_memory(streamed, CONFIG, tokens=64, batch=64, sharing=sharing).budget
        for sharing in (1, 2)
    ]
    assert budgets == [9_500_000_000, 5_000_000_000]


@pytest.mark.parametrize(
    ("offloaded", "keeps_freed", "device", "reuses"),
    [
        (False, False, "cpu", False),
        (False, True, "cpu", True),
        (True, False, "cpu", True),  # until the next batch is offloaded
        (True, False, "cuda:0", False),
    ],
)
def test_reuse_of_freed_memory(offloaded, keeps_freed, device, reuses):
    memory = MemoryPlan("block", device, offloaded, keeps_freed, 1000, {"block": 1000}, 999)
    assert memory.reuses_freed == reuses
    assert not memory.fits
    assert replace(memory, budget=1000).fits


def test_rounding_to_nearest_needs_no_activations(llama):
    config = rw.QuantizeConfig(group_size=32, method="rtn")
    streamed = open_streamed_model(llama)
    memory = plan_memory(streamed, config, tokens=0, batch=0)
    assert set(memory.parts) == {"libraries", "block", "rounding"}
    assert plan_disk(streamed, config, memory, tokens=0).keys() == {"result", "joining"}


@pytest.mark.parametrize("limit", [10**9, 30_000, 1])
@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_a_run_takes_no_more_disk_space_than_planned(limit, method, llama, tmp_path, monkeypatch):
    monkeypatch.setattr(sharding, "SHARD_BYTES", limit)
    config = rw.QuantizeConfig(group_size=32, method=method, recipe="textbook")
    out, sizes, real = tmp_path / "out", [], os.replace

    def measure_and_replace(*paths):
        files = out.rglob("*.safetensors*")
        headers = [read_header(file) for file in files if ".json" not in file.name]
        sizes.append(sum(info.nbytes for header in headers for info in header.values()))
        real(*paths)

    monkeypatch.setattr(os, "replace", measure_and_replace)
    options = {"samples": 4, "seq_len": 32}
    planned = plan(open_streamed_model(llama), config, **options).disk
    rw.quantize(llama, out, config, windows() if method == "gptq" else None, **options)
    assert planned["result"] == sizes[-1]
    assert max(sizes) <= sum(planned.values())
    if method == "gptq":
        assert "joining" not in planned  # activations take more, and are gone by then
    else:
        assert max(sizes) == sum(planned.values())
        assert ("joining" in planned) == (limit == 10**9)  # else embedding and head are larger


def test_the_mode_follows_the_budget_in_plan_and_run(llama, tmp_path):
    streamed, config = open_streamed_model(llama), CONFIG
    free = plan(streamed, config, samples=4, seq_len=32)
    assert free.memory.mode == "true_sequential"
    assert free.memory.fits
    tight = plan(streamed, config, samples=4, seq_len=32, budget=1000)
    least = min(
        plan(streamed, config, samples=4, seq_len=32, budget=1000, mode=mode).memory.peak_bytes
        for mode in ("block", "true_sequential")
    )
    # The memory of this process may grow between two plans.
    assert tight.memory.peak_bytes == pytest.approx(least, rel=0.05)
    assert "expected to need" in tight.warnings[-1]
    result = rw.quantize(llama, tmp_path, config, windows(), samples=4, seq_len=32, max_memory=1000)
    assert result.mode == tight.memory.mode
    assert "expected to need" in result.not_as_asked[-1]


def test_a_run_that_does_not_fit_on_the_disk_is_refused_before_it_begins(
    llama, tmp_path, monkeypatch
):
    config = rw.QuantizeConfig(group_size=32)
    planned = plan(open_streamed_model(llama), config, samples=4, seq_len=32)
    assert set(planned.disk) == {"result", "activations", "gradients"}
    needed = sum(planned.disk.values())
    free = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free._replace(free=needed - 1))
    with pytest.raises(OutputError, match=r"has room for .* needs .*gradients.*--output-tokens 0"):
        rw.quantize(llama, tmp_path / "out", config, windows(), samples=4, seq_len=32)
    assert not (tmp_path / "out" / "model-00001-of-00003.safetensors").exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free._replace(free=needed))
    rw.quantize(llama, tmp_path / "out", config, windows(), samples=4, seq_len=32)


def test_the_work_folder_is_as_large_as_planned(llama, tmp_path):
    config = rw.QuantizeConfig(group_size=32)
    sizes = []

    def measure(progress):
        if progress.layer is None and not sizes:
            sizes.append(
                sum(f.stat().st_size for f in (tmp_path / "out" / ".roundwise").glob("*-*"))
            )

    rw.quantize(llama, tmp_path / "out", config, windows(), samples=4, seq_len=32, progress=measure)
    planned = plan(open_streamed_model(llama), config, samples=4, seq_len=32).disk
    # After one of two blocks: half of the gradients, and one block's activations of two.
    expected = (planned["gradients"] + planned["activations"]) / 2
    assert sizes[0] == pytest.approx(expected, rel=0.2)


def test_layers_whose_width_is_open_count_as_the_target(llama):
    streamed = open_streamed_model(llama)
    config = rw.QuantizeConfig(group_size=32, target_bpw=5.0)
    names = {name for block in streamed.blocks for name in block.linears}
    weights = 2 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 96)
    total, stored = bytes_after(streamed, config, names)
    assert stored == pytest.approx(5.0 * weights / 8, rel=1e-4)
    plain_total, plain_stored = bytes_after(streamed, config, set())
    assert total - plain_total == stored - plain_stored


def test_the_message_names_the_largest_part(llama):
    config = rw.QuantizeConfig(group_size=32)
    many = plan(open_streamed_model(llama), config, samples=1_000_000, seq_len=64, mode="block")
    assert max(many.memory.parts, key=many.memory.parts.__getitem__) == "paused activations"
    assert "fewer --samples" in many.warnings[-1]
    assert "--mode true_sequential" in many.warnings[-1]  # which offloads batches to a file
    offloaded = plan(
        open_streamed_model(llama), config, samples=1 << 20, seq_len=64, batch_size=1 << 20,
        mode="true_sequential", budget=1 << 30,
    )  # fmt: skip
    assert offloaded.memory.offloaded
    assert "a smaller --batch-size" in offloaded.warnings[-1]


@pytest.mark.parametrize(
    ("parts", "advice"),
    [
        ({"forward of a batch": 2}, "try a smaller --batch-size"),
        ({"logits and their gradient": 2}, "try --output-tokens 0"),
        ({"block": 2, "drift": 1}, "try --recipe textbook"),
        ({"block": 2}, "try more memory"),
    ],
)
def test_the_advice_depends_on_the_largest_part(parts, advice):
    parts = {name: size * 10**9 for name, size in parts.items()} | {"libraries": 10**12}
    memory = MemoryPlan("block", "cpu", False, False, sum(parts.values()), parts, 10**9)
    message = over_budget_message(memory)
    assert f"more than the 1.0 GB available: the largest part is {next(iter(parts))}" in message
    assert message.endswith(advice) or f"{advice}, which" in message


def test_disk_space(tmp_path, monkeypatch):
    free = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free)
    check_disk_space(tmp_path, {"result": 900, "activations": 100})
    with pytest.raises(
        OutputError, match=r"has room for 1.0 kB, but the run needs 1.0 kB \(result"
    ):
        check_disk_space(tmp_path, {"result": 900, "activations": 101})
