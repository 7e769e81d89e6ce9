"""Each expert's weights are found, whichever way the files hold them, and fused again exactly."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from roundwise.checkpoint.reader import Checkpoint, TensorInfo, read_header
from roundwise.checkpoint.writer import write_safetensors
from roundwise.errors import CheckpointError
from roundwise.model.build import build, load_config
from roundwise.model.expert_weights import (
    ExpertSlice,
    FusedExpertTensor,
    fused_expert_tensors,
    install_linear_experts,
    replace_fused_experts,
    unquantized_tensors,
)
from roundwise.model.moe import LinearExperts, ProjectionNames
from roundwise.model.streamed import open_streamed_model
from tests.helpers import raw, tensors_of
from tests.mixtures import MIXTURES

NAMES = pytest.mark.parametrize("name", MIXTURES)
EXPERTS = "model.layers.0.mlp.experts"


def stored(folder: Path, tensor: torch.Tensor) -> TensorInfo:
    write_safetensors(folder / "x.safetensors", {"all": tensor})
    return read_header(folder / "x.safetensors")["all"]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("half", [None, 0, 1])
def test_a_slice_is_one_experts_matrix(half: int | None, transposed: bool, tmp_path: Path) -> None:
    tensor = torch.randn(3, 8, 6).bfloat16()
    info = ExpertSlice.from_whole(
        stored(tmp_path, tensor), "all", 2, half=half, transposed=transposed
    )
    expected = tensor[2].T if transposed else tensor[2]
    if half is not None:
        expected = expected.chunk(2)[half]
    assert (info.shape, info.nbytes) == (tuple(expected.shape), expected.numel() * 2)
    assert torch.equal(info.read(), expected)
    assert info.read().is_contiguous()
    assert b"".join(info.chunks()) == raw(expected)
    assert torch.equal(info.rows(1, 2).read(), expected[1:3])


@NAMES
def test_every_projection_has_its_own_tensor(name: str, folder_of: Callable[[str], Path]) -> None:
    checkpoint = Checkpoint(folder_of(name))
    model = build(load_config(checkpoint), torch.float32)
    view, layout = install_linear_experts(model, checkpoint)
    experts = model.get_submodule(MIXTURES[name].experts)
    assert isinstance(experts, LinearExperts)
    usual = ProjectionNames() if name != "mixtral" else ProjectionNames("w1", "w3", "w2")
    assert set(layout.values()) == {usual}
    assert f"{MIXTURES[name].stored}.weight" in view.tensors
    is_fused = name in ("gpt_oss", "granitemoe")
    assert (view is checkpoint) != is_fused
    slices = [info for info in view.tensors.values() if isinstance(info, ExpertSlice)]
    assert bool(slices) == is_fused
    assert unquantized_tensors(view.tensors, set()) == checkpoint.tensors
    again = build(load_config(checkpoint), torch.float32)
    replace_fused_experts(again, layout)
    assert again.state_dict().keys() == model.state_dict().keys()


def test_a_transposed_tensor_with_biases_is_split(folder_of: Callable[[str], Path]) -> None:
    view = open_streamed_model(folder_of("gpt_oss")).checkpoint
    fused = tensors_of(folder_of("gpt_oss"))
    W, b = fused[f"{EXPERTS}.gate_up_proj"], fused[f"{EXPERTS}.gate_up_proj_bias"]
    read = {key: view.tensors[f"{EXPERTS}.3.{key}"].read() for key in ("gate_proj.weight",
        "up_proj.weight", "up_proj.bias", "down_proj.weight")}  # fmt: skip
    assert torch.equal(read["gate_proj.weight"], W[3].T[:96])
    assert torch.equal(read["up_proj.weight"], W[3].T[96:])
    assert torch.equal(read["up_proj.bias"], b[3, 96:])
    assert torch.equal(read["down_proj.weight"], fused[f"{EXPERTS}.down_proj"][3].T)


def test_a_fused_tensor_of_another_shape(copy_of: Callable[[str], Path]) -> None:
    folder = copy_of("gpt_oss")
    tensors = tensors_of(folder)
    tensors[f"{EXPERTS}.down_proj"] = tensors[f"{EXPERTS}.down_proj"][:, :-1]
    write_safetensors(folder / "model.safetensors", tensors)
    with pytest.raises(
        CheckpointError, match=r"experts\.down_proj has shape .* requires \[4, 96, 64\]"
    ):
        open_streamed_model(folder)


def test_only_unquantized_experts_are_fused_again(folder_of: Callable[[str], Path]) -> None:
    view = open_streamed_model(folder_of("gpt_oss")).checkpoint
    first = {
        f"{EXPERTS}.{expert}.{name}_proj"
        for expert in range(4)
        for name in ("gate", "up", "down")
    }  # fmt: skip
    others = unquantized_tensors(view.tensors, first)
    assert f"{EXPERTS}.gate_up_proj" not in others
    assert not any(f"{name}.weight" in others for name in first)
    assert f"{EXPERTS}.0.up_proj.bias" in others  # biases are stored beside the codes
    assert "model.layers.1.mlp.experts.gate_up_proj" in others


@pytest.mark.parametrize("transposed", [False, True])
def test_a_fused_tensor_is_assembled(transposed: bool) -> None:
    members = {name: torch.randn(2, 3) for name in ("g0", "u0", "g1", "u1")}
    fused = FusedExpertTensor("all", [["g0", "u0"], ["g1", "u1"]], transposed)
    tensor = fused.assemble(members.__getitem__)
    expected = torch.stack(
        [torch.cat([members["g0"], members["u0"]]), torch.cat([members["g1"], members["u1"]])]
    )
    assert torch.equal(tensor, expected.transpose(1, 2) if transposed else expected)


@NAMES
def test_slices_assemble_to_the_fused_tensors(name: str, folder_of: Callable[[str], Path]) -> None:
    streamed = open_streamed_model(folder_of(name))
    tensors = streamed.checkpoint.tensors
    layers = [layer for block in streamed.blocks for layer in block.linears]
    plain = build(load_config(Checkpoint(folder_of(name))), torch.float32)
    fused = fused_expert_tensors(plain, layers)
    # Other families' files hold the experts separately, so nothing is to be fused.
    assert len(fused) == {"gpt_oss": 2 * 4, "granitemoe": 2 * 2}.get(name, 0)
    for tensor in fused:
        first = tensors[tensor.members[0][0]]
        assert isinstance(first, ExpertSlice)
        (origin,) = first.origins.values()
        whole = origin.read()
        assembled = tensor.assemble(lambda member: tensors[member].read())
        assert torch.equal(assembled, whole)


@NAMES
def test_routers_and_gates_are_skipped(name: str, folder_of: Callable[[str], Path]) -> None:
    for block in open_streamed_model(folder_of(name)).blocks:
        assert not any(n.endswith((".gate", "router", "shared_expert_gate")) for n in block.linears)
        assert not any("router" in n for n in block.linears)
        if name == "qwen2_moe":
            assert block.skipped_linears == {
                f"{block.name}.mlp.shared_expert_gate": "a gate: it weights the shared expert"
            }
