"""Memory, disk space and operations of a run, from shapes that are small enough to count by hand."""

from __future__ import annotations

import pytest
import torch

import roundwise as rw
from roundwise.core.solver import workspace
from roundwise.model.streamed import open_streamed_model
from roundwise.plan import cost_model
from roundwise.plan.cost_model import (
    EFFICIENCY,
    BlockShapes,
    LinearShape,
    block_shapes,
    disk_bytes,
    gradient_bytes,
    measure_flops,
    memory_bytes,
    phase_flops,
    phase_seconds,
    survey_flops,
)
from roundwise.system.device import HOST

TEXTBOOK = rw.QuantizeConfig(group_size=32, recipe="textbook")
WIDE, DOWN = LinearShape(10, 4), LinearShape(4, 10)
#: Two linears that read one input, and one that reads another; bfloat16, 3 blocks.
SHAPES = BlockShapes([WIDE, WIDE, DOWN], [WIDE, DOWN], 240, 4, 2, 3, HOST)


def test_shapes_of_the_largest_block_and_of_the_head(folder_of):
    config = rw.QuantizeConfig(group_size=32, lm_head=True)
    block, head = block_shapes(open_streamed_model(folder_of("opt"), lm_head=True), config)
    shapes = [(x.rows, x.columns) for x in block.linears]
    assert sorted(shapes) == sorted([*[(64, 64)] * 4, (96, 64), (64, 96)])
    assert sorted(x.columns for x in block.inputs) == [64, 64, 64, 96]  # q, k and v share one
    assert (block.hidden, block.itemsize, block.blocks, block.widest) == (64, 4, 2, 96)
    assert [(x.rows, x.columns) for x in head.linears] == [(128, 64)]
    assert head.blocks == 1


def test_skipped_layers_do_not_count(llama):
    config = rw.QuantizeConfig(group_size=32, dynamic={"self_attn": None})
    (block,) = block_shapes(open_streamed_model(llama), config)
    assert len(block.linears) == 3
    nothing = rw.QuantizeConfig(dynamic={"layers": None})
    assert block_shapes(open_streamed_model(llama), nothing) == []


@pytest.mark.parametrize(("experts", "share", "inputs"), [("routed", 0.5, 8), ("all", 1.0, 5)])
def test_experts_see_a_share_of_the_tokens(experts, share, inputs, folder_of):
    config = rw.QuantizeConfig(group_size=32, experts=experts)
    (block,) = block_shapes(open_streamed_model(folder_of("mixtral")), config)
    # 4 experts of 3 linears each, 2 experts per token; 4 linears of the attention.
    assert [x.token_share for x in block.linears].count(0.5) == 12
    assert len(block.inputs[4:]) == inputs
    assert {x.token_share for x in block.inputs[4:]} == {share}


def test_memory_of_textbook_gptq():
    parts = memory_bytes(
        SHAPES, TEXTBOOK, tokens=100, batch=10, mode="true_sequential", offloaded=False
    )
    assert parts == {
        "block": 240,
        "quantized weights": 2 * 2 * 40,
        "paused activations": 100 * (2 * 4 + 10) * 2,
        "forward of a batch": 3 * 10 * 16 * 2,
        "hessian": 4 * 10**2,
        "factor": 4 * 10**2,
        "solver": 4 * workspace(HOST) * cost_model.SOLVING,
        "codes and weights of a layer": 8 * 40,
    }  # fmt: skip
    block = memory_bytes(SHAPES, TEXTBOOK, tokens=100, batch=10, mode="block", offloaded=False)
    assert block["paused activations"] == 100 * 4 * 2
    assert block["hessian"] == 4 * (4**2 + 10**2)


def test_memory_of_the_best_recipe():
    best = rw.QuantizeConfig(group_size=32)
    parts = memory_bytes(SHAPES, best, tokens=100, batch=10, mode="block", offloaded=False)
    assert parts["paused activations"] == 2 * 100 * 4 * 2  # the reference too
    assert parts["drift"] == 4 * (4 * 4 + 4 * 10)
    # The linear with most outputs has the largest B; it is solved last.
    assert parts["output weighting"] == 4 * (2 * 10**2 + 40)
    assert parts["solver"] == 4 * workspace(HOST) * cost_model.REFINING
    assert "allocator cache" not in parts
    kept = memory_bytes(
        SHAPES, best, tokens=100, batch=10, mode="block", offloaded=False, keeps_freed=True
    )
    assert kept["allocator cache"] == int(
        1.5 * parts["forward of a batch"] + 0.1 * parts["paused activations"]
    )


def test_with_offloading_a_batch_runs_or_a_layer_is_solved():
    solving = memory_bytes(
        SHAPES, TEXTBOOK, tokens=10**6, batch=10, mode="true_sequential", offloaded=True
    )
    assert "solver" in solving and "paused activations" not in solving
    running = memory_bytes(
        SHAPES, TEXTBOOK, tokens=10**6, batch=10**6, mode="true_sequential", offloaded=True
    )
    assert running["paused activations"] == 10**6 * 18 * 2
    assert "solver" not in running


def test_an_accelerator_does_not_factor_in_place():
    cuda = BlockShapes(SHAPES.linears, SHAPES.inputs, 240, 4, 2, 3, torch.device("cuda"))
    parts = memory_bytes(cuda, TEXTBOOK, tokens=100, batch=10, mode="block", offloaded=False)
    assert parts["factor"] == 2 * 4 * 10**2


def test_memory_and_disk_of_gradients():
    config = rw.QuantizeConfig(group_size=32, output_tokens=64)
    parts = gradient_bytes(SHAPES, config, tokens=100, vocabulary=1000)
    assert parts["head"] == 2 * 4 * 1000
    assert parts["logits and their gradient"] == 2 * 2 * 64 * 1000
    assert parts["block inputs"] == 2 * 64 * 4 * 5
    assert parts["gradients"] == 3 * 2 * 64 * 24
    assert gradient_bytes(SHAPES, TEXTBOOK, tokens=100, vocabulary=1000) == {}
    assert gradient_bytes(SHAPES, config, tokens=0, vocabulary=1000) == {}
    disk = disk_bytes(SHAPES, config, tokens=100, mode="block", offloaded=True)
    assert disk == {
        "activations": 2 * 2 * 100 * 4 * 2,
        "offloaded activations": 100 * 8 * 2,
        "gradients": 3 * 64 * 24 * 2,
    }


def test_operations_of_each_phase():
    flops = phase_flops(SHAPES, TEXTBOOK, tokens=100, mode="true_sequential")
    assert flops == {
        "forward": 3 * 2.0 * 120 * 100,
        "hessian": 3 * 100 * (16 + 100),
        "factor": 3 * (64 + 1000) / 3,
        "solve": 3 * 2.0 * (40 * 4 + 40 * 4 + 40 * 10),
    }
    block = phase_flops(SHAPES, TEXTBOOK, tokens=100, mode="block")
    assert block["forward"] == 2 * flops["forward"]
    best = phase_flops(SHAPES, rw.QuantizeConfig(group_size=32), tokens=100, mode="block")
    assert best["forward"] == 4 * flops["forward"]
    assert {"drift", "gradients", "refine"} <= best.keys()


def test_operations_of_bit_allocation():
    config = rw.QuantizeConfig(target_bpw=4.0, target_widths=(4, 8), group_size=64)
    few, many = (survey_flops(SHAPES, config, tokens=tokens)["survey"] for tokens in (0, 100))
    assert many - few == pytest.approx(3 * 100 * (2 * 120 + 116))
    # 2 widths x 3 group sizes, for 2 inputs each.
    runs = 6 * 2 * 2 * 120 * cost_model.CANDIDATE_TOKENS
    assert few == pytest.approx(3 * (runs + 6 * (1064 / 3 + 2 * 720)))


def test_the_speed_of_this_machine():
    flops = measure_flops(torch.float32, HOST)
    assert 10**7 < flops < 10**15


def test_seconds_follow_from_the_speed_in_the_phases_dtype(monkeypatch):
    speeds = {torch.float32: 100.0, torch.bfloat16: 400.0}
    monkeypatch.setattr(cost_model, "measure_flops", lambda dtype, _: speeds[dtype])
    seconds = phase_seconds({"forward": 400.0, "solve": 100.0}, torch.bfloat16, HOST)
    assert seconds == pytest.approx(
        {"forward": 1 / EFFICIENCY["forward"], "solve": 1 / EFFICIENCY["solve"]}
    )
