"""Groups of linears that read the same input, and the sums over it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from roundwise.errors import RunError
from roundwise.forward.input_groups import InputGroup, ReferenceActivations
from roundwise.model.streamed import open_streamed_model
from roundwise.system.device import HOST
from roundwise.system.distributed import Ranks
from tests.helpers import ARCHITECTURES, batches, run_blocks, windows

NAMES = pytest.mark.parametrize("name", ARCHITECTURES)


@NAMES
def test_linears_that_read_the_same_input_form_a_group(
    name: str, folder_of: Callable[[str], Path]
) -> None:
    architecture = ARCHITECTURES[name]
    runs = run_blocks(open_streamed_model(folder_of(name)), batches(windows()))
    for index, (groups, _) in enumerate(runs):
        prefix = f"{architecture.blocks}.{index}."
        names = [tuple(n.removeprefix(prefix) for n in group.names) for group in groups]
        assert names == architecture.groups


def test_a_linear_that_is_called_twice_is_refused_by_name(llama: Path) -> None:
    streamed = open_streamed_model(llama)
    mlp = streamed.blocks[0].module.mlp
    plain = mlp.forward
    mlp.forward = lambda x: plain(x) + plain(x)
    with pytest.raises(RunError, match=r"layers\.0\.mlp\.gate_proj is called more than once"):
        list(run_blocks(streamed, batches(windows())))


def test_linears_that_add_to_the_residual_stream_know_where_it_is(llama: Path) -> None:
    groups, _ = next(run_blocks(open_streamed_model(llama), batches(windows())))
    block = "model.layers.0"
    assert {group.names[0].rpartition(".")[2]: group.residual for group in groups} == {
        "q_proj": None,
        "o_proj": f"{block}.input_layernorm",
        "gate_proj": None,
        "down_proj": f"{block}.post_attention_layernorm",
    }


def test_moments_are_means_over_tokens() -> None:
    group, x = InputGroup(["a"]), torch.randn(2, 5, 4)
    group.add(x[:1], None)
    group.add(x[1:], torch.tensor([[True, True, True, False, False]]))
    moments = group.take_moments()
    X = torch.cat([x[0], x[1, :3]]).double()
    assert moments is not None
    assert moments.tokens == 8
    torch.testing.assert_close(moments.H.double(), X.T @ X / 8)
    assert moments.drift.input is None and moments.drift.residual is None
    assert group.take_moments() is None  # the sums were taken


def test_held_out_batches_are_summed_separately() -> None:
    group, x = InputGroup(["a"]), torch.randn(3, 4, 6)
    assert group.part(held=False) is group
    for index in range(3):
        group.part(held=index == 2).add(x[index], None)
    assert group.hessian is not None and group.held is not None and group.held.hessian is not None
    assert (group.hessian.tokens, group.held.hessian.tokens) == (8, 4)
    torch.testing.assert_close(group.held.hessian.mean(), x[2].T @ x[2] / 4)


def test_drift_of_the_input_and_of_the_residual_stream() -> None:
    x, x_original, stream, stream_original = (torch.randn(1, 5, 4) for _ in range(4))
    group = InputGroup(["a"])
    group.add(x, None)
    group.add_drift(x, ReferenceActivations(stream_original, x_original), stream, None)
    moments = group.take_moments()
    assert moments is not None
    X, X_original, R, R_original = (t[0].double() for t in (x, x_original, stream, stream_original))
    torch.testing.assert_close(moments.drift.input.double(), (X_original - X).T @ X / 5)
    torch.testing.assert_close(moments.drift.residual.double(), (R_original - R).T @ X / 5)


def test_drift_of_the_output_instead_of_the_input() -> None:
    # The original model's output X̃Wᵀ gives the same target shift as its input X̃.
    x, x_original, stream, stream_original = (torch.randn(1, 50, 4) for _ in range(4))
    linear = nn.Linear(4, 4, bias=True).requires_grad_(False)
    W = linear.weight
    shifts = []
    for through_output in (False, True):
        group = InputGroup(["a"])
        original = ReferenceActivations(stream_original, x_original)
        if through_output:
            group.linear, group.ratio = linear, 0.5 / 0.25
            original = ReferenceActivations(stream_original, y=linear(x_original))
        group.add(x, None)
        group.add_drift(x, original, stream, None)
        moments = group.take_moments()
        assert moments is not None
        shifts.append(moments.drift.take_target_shift(W, 0.5, 0.25))
    torch.testing.assert_close(shifts[0], shifts[1], rtol=1e-4, atol=1e-5)


def test_sums_of_a_single_rank_are_complete() -> None:
    group = InputGroup(["a"])
    group.all_reduce(Ranks(), HOST)
    assert group.hessian is None
    group.add(torch.ones(2, 4), None)
    group.all_reduce(Ranks(), HOST)
    assert group.hessian is not None and group.hessian.tokens == 2
    group.clear()
    assert group.hessian is None
