"""Who serves what, and tensor parallelism."""

import pytest

from roundwise.checkpoint.engines import served_by, tensor_parallel

LANE = {"bits": 4, "group_size": 128, "sym": True, "desc_act": False, "format": "gptq"}


def refusing(**changes) -> set[str]:
    return {engine for engine, reason in served_by([LANE | changes]).items() if reason}


@pytest.mark.parametrize(
    ("changes", "engines"),
    [
        ({}, set()),
        ({"bits": 8}, {"vLLM, CPU", "ExLlamaV2"}),
        ({"bits": 3}, {"vLLM, CPU", "vLLM, GPU (Marlin)", "ExLlamaV2"}),
        ({"sym": False, "format": "gptq_v2"}, {"vLLM, CPU", "vLLM, GPU (Marlin)"}),
        ({"sym": False}, {"vLLM, CPU", "vLLM, GPU (Marlin)", "GPTQModel"}),
        ({"desc_act": True}, {"vLLM, CPU", "vLLM, GPU (Marlin)"}),
        ({"group_size": 16}, {"vLLM, CPU", "vLLM, GPU (Marlin)"}),
        ({"experts": "gate_proj"}, {"vLLM, CPU"}),
        ({"experts": "w1"}, {"vLLM, CPU", "GPTQModel"}),
        ({"experts": "together"}, {"vLLM, CPU", "vLLM, GPU (Marlin)"}),
        ({"experts": "mixed"}, {"vLLM, CPU", "vLLM, GPU (Marlin)"}),
    ],
)
def test_engines(changes, engines):
    assert refusing(**changes) == engines


def test_one_layer_decides_for_the_model():
    assert served_by([LANE, LANE | {"bits": 8}])["ExLlamaV2"] is not None


@pytest.mark.parametrize(
    ("heads", "kv_heads", "down", "group", "degrees"),
    [
        (32, 8, 14336, 128, [1, 2, 4, 8, 16]),  # Llama 3 8B: 14336 / 32 is no multiple of 128
        (32, 8, 14336, 64, [1, 2, 4, 8, 16, 32]),
        (32, 32, 11008, 128, [1, 2]),  # Llama 2 7B: 11008 = 86 groups of 128
        (12, 12, 14336, 128, [1, 2, 4]),
        (32, 8, 14336, -1, [1, 2, 4, 8, 16, 32]),
    ],
)
def test_tensor_parallelism_needs_whole_groups_and_heads(heads, kv_heads, down, group, degrees):
    linears = [(4096, 4096, group), (1024, 4096, group), (down, 4096, group), (4096, down, group)]
    assert tensor_parallel(linears, hidden=4096, heads=heads, kv_heads=kv_heads) == degrees
