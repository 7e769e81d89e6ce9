"""From the sums over an input to packed weights, records and fallbacks of one block."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import roundwise as rw
from roundwise.checkpoint.manifest import LayerRecord, widths
from roundwise.core.drift import Drift, Moments
from roundwise.errors import CheckpointError, NumericalError, SingularError
from roundwise.forward.input_groups import InputGroup
from roundwise.model.blocks import weight_of
from roundwise.model.streamed import StreamedModel, open_streamed_model
from roundwise.run.block_solver import BlockSolver, GroupStatistics, group_statistics
from roundwise.run.finalize import packed_block
from roundwise.system.distributed import Ranks
from tests.conftest import QUICK
from tests.helpers import windows

PREFIX = "model.layers.0"


@pytest.fixture
def streamed(llama: Path) -> StreamedModel:
    """The small Llama with its first block loaded."""
    streamed = open_streamed_model(llama)
    streamed.load(streamed.blocks[0].module, streamed.blocks[0].prefix)
    return streamed


def solver_of(streamed: StreamedModel, config: rw.QuantizeConfig, **changes: Any) -> BlockSolver:
    """A solver of the first block that collects records."""
    options: dict[str, Any] = {
        "ranks": Ranks(), "maps": {}, "gradients": {}, "on_layer": lambda _: None,
    }  # fmt: skip
    return BlockSolver(streamed.blocks[0], config, **{**options, **changes})


def group_of(*names: str, tokens: int = 200) -> InputGroup:
    """A group of linears with 64 input channels, and the sums of random inputs."""
    group = InputGroup([f"{PREFIX}.{name}" for name in names])
    group.add(torch.randn(tokens, 64, generator=torch.Generator().manual_seed(0)), None)
    return group


def test_a_group_is_solved_replaced_packed_and_recorded(streamed: StreamedModel) -> None:
    reported: list[LayerRecord] = []
    solver = solver_of(streamed, QUICK, on_layer=reported.append)
    linear = streamed.blocks[0].linears[f"{PREFIX}.mlp.up_proj"]
    W = weight_of(linear).clone()
    group = group_of("mlp.gate_proj", "mlp.up_proj")
    assert group.hessian is not None
    expected = rw.solve(W.clone(), group.hessian.mean(), QUICK)
    solver.solve(group)
    assert [layer.name for layer in solver.layers] == group.names
    assert reported == solver.layers
    assert torch.equal(weight_of(linear), expected.dequantize())
    record = solver.layers[1]
    assert record.relative_error == pytest.approx(expected.relative_error)
    assert (record.bits, record.group_size, record.tokens) == (4, 32, 200)
    assert (record.fallback, record.gradients) == (None, 0)
    assert "confirmed_drift" not in record
    assert solver.packed[record.name].keys() == {"qweight", "qzeros", "scales", "g_idx"}


def test_linears_without_a_group_are_rounded_to_nearest(streamed: StreamedModel) -> None:
    config = rw.QuantizeConfig(**{**QUICK.model_dump(), "dynamic": {"o_proj": None}})
    solver = solver_of(streamed, config)
    solver.solve(group_of("mlp.gate_proj", "mlp.up_proj"))
    solver.quantize_remaining()
    fallbacks = {layer.name.rpartition(".")[2]: layer.fallback for layer in solver.layers}
    assert fallbacks.pop("gate_proj") is fallbacks.pop("up_proj") is None
    assert fallbacks == dict.fromkeys(
        ("q_proj", "k_proj", "v_proj", "down_proj"), "no calibration token reached this layer"
    )
    assert all(layer.relative_error is None for layer in solver.layers[2:])


def test_a_singular_hessian_is_a_fallback_and_nan_an_error(streamed: StreamedModel) -> None:
    solver = solver_of(streamed, QUICK)
    zeros = InputGroup([f"{PREFIX}.self_attn.q_proj"])
    zeros.add(torch.zeros(8, 64), None)
    solver.solve(zeros)
    assert "Hessian is zero" in str(solver.layers[0].fallback)
    with torch.no_grad():
        weight_of(streamed.blocks[0].linears[f"{PREFIX}.self_attn.k_proj"])[3, 5] = torch.nan
    with pytest.raises(NumericalError, match=rf"{PREFIX}.self_attn.k_proj: NaN or infinity"):
        solver.solve(group_of("self_attn.k_proj"))


def test_gradients_weigh_outputs(streamed: StreamedModel) -> None:
    config = QUICK.merged({"output_tokens": 16})
    name = f"{PREFIX}.self_attn.q_proj"
    gradients = {name: [torch.randn(16, 64), torch.randn(4, 64)]}
    solver = solver_of(streamed, config, gradients=gradients)
    plain = solver_of(streamed, config)
    codes = []
    for each in (solver, plain):
        streamed.load(streamed.blocks[0].module, streamed.blocks[0].prefix)
        each.solve(group_of("self_attn.q_proj"))
        codes.append(each.packed[name]["qweight"])
    assert (solver.layers[0].gradients, plain.layers[0].gradients) == (20, 0)
    assert not torch.equal(*codes)


class TestGroupStatistics:
    def moments(self, seed: int = 0, tokens: int = 100) -> Moments:
        generator = torch.Generator().manual_seed(seed)
        X = torch.randn(tokens, 16, generator=generator)
        other = X + 0.6 * X.roll(1, dims=1) + 1.5 * torch.randn(tokens, 16, generator=generator)
        return Moments(X.T @ X / tokens, Drift((other - X).T @ X / tokens), tokens)

    def test_without_tokens(self) -> None:
        statistics = group_statistics({}, None, None)
        assert statistics.tokens == 0
        with pytest.raises(SingularError, match="no calibration token reached this layer"):
            _ = statistics.H
        W = torch.ones(4, 16)
        assert statistics.take_target_shift("q", W, QUICK, None, last=True) is None

    def test_the_factor_is_computed_once_for_equal_settings(self) -> None:
        statistics = GroupStatistics(self.moments())
        first = statistics.prepared(QUICK)
        assert statistics.prepared(QUICK.merged({"bits": 8})) is first
        assert statistics.prepared(QUICK.merged({"damp_percent": 0.1})) is not first

    def test_a_part_of_the_correction_of_all_tokens_is_used(self) -> None:
        W, config = torch.randn(4, 16), rw.QuantizeConfig(group_size=16)
        fit, held = self.moments(0, 60), self.moments(1, 20)
        statistics = group_statistics({"q": (W, config)}, fit, held)
        part = statistics.confirmed["q"]
        assert 0.2 < part < 1
        assert statistics.tokens == 80
        both = 0.75 * self.moments(0, 60).H + 0.25 * self.moments(1, 20).H
        torch.testing.assert_close(statistics.H, both)
        drift = [self.moments(*each).drift.input for each in ((0, 60), (1, 20))]
        assert drift[0] is not None and drift[1] is not None
        expected = part * config.alpha * W @ (0.75 * drift[0] + 0.25 * drift[1])
        rows = statistics.take_target_shift("q", W[1:3], config, slice(1, 3), last=False)
        torch.testing.assert_close(rows, expected[1:3])
        shift = statistics.take_target_shift("q", W, config, None, last=True)
        torch.testing.assert_close(shift, expected)
        assert statistics.moments is not None and statistics.moments.drift.is_empty

    @pytest.mark.parametrize("held", [False, True])
    def test_without_held_out_tokens_nothing_is_corrected(self, held: bool) -> None:
        W, config = torch.randn(4, 16), rw.QuantizeConfig(group_size=16)
        parts = (None, self.moments()) if held else (self.moments(), None)
        statistics = group_statistics({"q": (W, config)}, *parts)
        assert statistics.confirmed == {"q": 0.0} and statistics.tokens == 100
        shift = statistics.take_target_shift("q", W, config, None, last=True)
        assert shift is not None and not shift.any()


def record(name: str, bits: int, group_size: int) -> LayerRecord:
    return LayerRecord(
        name=name, bits=bits, group_size=group_size, relative_error=0.01, weight_error=0.01,
        damp_percent=0.01, damp_tried=[0.01], tokens=1, fallback=None,
    )  # fmt: skip


def test_widths_by_kind_of_layer() -> None:
    alike = [record(f"layers.{i}.q", 4, 128) for i in range(3)]
    assert widths(alike) == {}
    layers = [*alike, record("layers.3.q", 3, 32), record("layers.0.o", 8, 128)]
    assert widths(layers) == {"layers.*.q": "4/128 x3, 3/32 x1", "layers.*.o": "8/128 x1"}


def test_tensors_of_a_block(streamed: StreamedModel) -> None:
    packed = {f"{PREFIX}.mlp.up_proj": {"qweight": torch.ones(1), "scales": torch.ones(2)}}
    tensors = packed_block(streamed, 0, packed)
    assert f"{PREFIX}.mlp.up_proj.weight" not in tensors
    assert torch.equal(tensors[f"{PREFIX}.mlp.up_proj.qweight"], torch.ones(1))
    assert torch.equal(tensors[f"{PREFIX}.mlp.up_proj.scales"], torch.ones(2))
    assert f"{PREFIX}.input_layernorm.weight" in tensors
    assert f"{PREFIX}.mlp.gate_proj.weight" in tensors  # as in the source
    assert not any(name.startswith("model.layers.1.") for name in tensors)


class TestFaultyModels:
    """Faults of a model that show while a run works."""

    def spoil(self, folder: Path, tensor: str, value: float) -> None:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder)
        with torch.no_grad():
            model.get_parameter(tensor)[3, 5] = value
        model.save_pretrained(folder)

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    @pytest.mark.parametrize("method", ["gptq", "rtn"])
    def test_a_weight_that_is_not_finite_names_its_layer(
        self, value: float, method: str, copy_of: Callable[[str], Path], tmp_path: Path
    ) -> None:
        folder = copy_of("llama")
        self.spoil(folder, "model.layers.1.mlp.up_proj.weight", value)
        config = QUICK.merged({"method": method})
        with pytest.raises(NumericalError, match=r"layers\.1\.mlp\.up_proj: NaN or infinity"):
            rw.quantize(folder, tmp_path / "out", config, windows(), samples=4, seq_len=32)
        assert not (tmp_path / "out" / "config.json").exists()

    def test_an_embedding_that_is_not_finite_is_named(
        self, copy_of: Callable[[str], Path], tmp_path: Path
    ) -> None:
        folder = copy_of("llama")
        self.spoil(folder, "model.embed_tokens.weight", float("inf"))
        rows = [[7] * 32, [8] * 32, [9] * 31 + [3]]
        with pytest.raises(CheckpointError, match=r"embed_tokens\.weight holds NaN .*\(row 3\)"):
            rw.quantize(
                folder, tmp_path / "out", QUICK, rows, samples=3, seq_len=32, batch_size=1
            )  # fmt: skip

    def test_layers_with_zero_inputs_fall_back(
        self, copy_of: Callable[[str], Path], tmp_path: Path
    ) -> None:
        # A norm of zeros: all inputs of the MLP are zero.
        folder = copy_of("llama")
        model = transformers.AutoModelForCausalLM.from_pretrained(folder)
        with torch.no_grad():
            model.model.layers[1].post_attention_layernorm.weight.zero_()
        model.save_pretrained(folder)
        settings: dict[str, Any] = {"samples": 4, "seq_len": 32}
        result = rw.quantize(folder, tmp_path / "out", QUICK, windows(), **settings)
        reasons = {layer["name"]: layer["fallback"] for layer in result.layers}
        fallbacks = {name for name, reason in reasons.items() if reason}
        assert fallbacks == {f"model.layers.1.mlp.{n}_proj" for n in ("gate", "up", "down")}
        assert "Hessian is zero" in str(reasons["model.layers.1.mlp.up_proj"])
        assert result.not_as_asked[0].startswith(
            "model.layers.1.mlp.gate_proj: rounded to nearest: the Hessian is zero"
        )
