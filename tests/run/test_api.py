"""`roundwise.quantize` equals a plain implementation that holds the whole model in memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers

import roundwise as rw
from roundwise.checkpoint.quantized_layers import quantized_layers
from roundwise.checkpoint.reader import Checkpoint
from roundwise.core.solver import sample_rows
from roundwise.model.blocks import weight_of
from tests.conftest import BEST, QUICK
from tests.helpers import (
    ARCHITECTURES,
    Stop,
    assign,
    contents,
    edited_json,
    linear_names,
    raw,
    stop_after,
    tensors_of,
    windows,
)

NAMES = pytest.mark.parametrize("name", ARCHITECTURES)


#: Modules whose input is the residual stream that a linear adds to.
STREAMS: dict[str, dict[str, str]] = {
    "llama": {"self_attn.o_proj": "input_layernorm", "mlp.down_proj": "post_attention_layernorm"},
    "gpt2": {"attn.c_proj": "ln_1", "mlp.c_proj": "ln_2"},
    # There is a norm between the linears and the stream.
    "gemma3": {},
    # The attention's output is added to the MLP's in place, and both together to the stream.
    "falcon": {"mlp.dense_4h_to_h": "input_layernorm"},
}


class Plain:
    """Textbook GPTQ: whole models in memory, one forward per group, float64 sums."""

    def __init__(self, folder: Path, name: str, rows: list[list[int]]) -> None:
        self.model, self.original = (
            transformers.AutoModelForCausalLM.from_pretrained(folder).eval() for _ in range(2)
        )
        self.name, self.rows = name, rows

    @torch.no_grad()
    def inputs(self, model: Any, module: str) -> torch.Tensor:
        """All inputs of a module, [tokens, channels]."""
        seen: list[torch.Tensor] = []
        hook = model.get_submodule(module).register_forward_pre_hook(
            lambda _, args: seen.append(args[0].reshape(-1, args[0].shape[-1]).double())
        )
        for row in self.rows:
            model(input_ids=torch.tensor([row]), use_cache=False)
        hook.remove()
        return torch.cat(seen)

    def moments(self, prefix: str, linear: str, *, best: bool) -> list[Part]:
        """Moments of a linear's input over all tokens, those for the correction, and those held out."""
        X = self.inputs(self.model, prefix + linear)
        lost, stream_lost = torch.zeros_like(X), None
        if best:
            lost = self.inputs(self.original, prefix + linear) - X
            if stream := STREAMS[self.name].get(linear):
                R, before = (self.inputs(m, prefix + stream) for m in (self.model, self.original))
                stream_lost = before - R
        held = 2 * len(self.rows[0])  # the last of eight batches of two windows
        return [
            Part(
                X[rows].T @ X[rows] / len(X[rows]),
                lost[rows].T @ X[rows] / len(X[rows]),
                0.0 if stream_lost is None else stream_lost[rows].T @ X[rows] / len(X[rows]),
                len(X[rows]),
            )
            for rows in (slice(None), slice(0, -held), slice(-held, None))
        ]

    def run(
        self, ours: dict[str, rw.QuantizedWeight], config: rw.QuantizeConfig, *, sequential: bool
    ) -> dict[str, rw.QuantizedWeight]:
        """Solves every group; continues with `ours`, so that a rounding tie is counted only once."""
        architecture = ARCHITECTURES[self.name]
        solved: dict[str, rw.QuantizedWeight] = {}
        best = config.needs_reference
        for index in range(len(self.model.get_submodule(architecture.blocks))):
            prefix = f"{architecture.blocks}.{index}."
            leaders = [group[0] for group in architecture.groups]
            before = {leader: self.moments(prefix, leader, best=best) for leader in leaders}
            for group in architecture.groups:
                now = self.moments(prefix, group[0], best=best) if sequential else before[group[0]]
                names = [prefix + linear for linear in group]
                weights = [
                    weight_of(self.model.get_submodule(name)).detach().double() for name in names
                ]
                shifts = corrections(weights, *now) if best else [None] * len(names)
                for name, W, shift in zip(names, weights, shifts, strict=True):
                    solved[name] = rw.solve(W.float(), now[0].H.float(), config, target_shift=shift)
                    assign(self.model, name, ours[name].dequantize())
        return solved


class Part(NamedTuple):
    """Moments of an input X over some tokens, in float64."""

    H: torch.Tensor
    lost: torch.Tensor
    """(X̃ - X)ᵀX / n."""
    stream_lost: torch.Tensor | float
    """(R̃ - R)ᵀX / n; 0: the layer adds to no stream."""
    tokens: int

    def shift(self, W: torch.Tensor) -> torch.Tensor:
        """(wanted output - present output)ᵀX / n."""
        return W @ self.lost + self.stream_lost

    def damped(self, ridge: float) -> torch.Tensor:
        return self.H + ridge * self.H.diagonal().mean() * torch.eye(len(self.H))


def corrections(
    weights: list[torch.Tensor], whole: Part, fit: Part, held: Part
) -> list[torch.Tensor]:
    """The target shifts of linears that read one input, as docs/maths.md says it."""
    best, ridge, parts = -1.0, 0.0, [0.0]
    for candidate in (0.01, 0.1, 1.0):
        gain, found = 0.0, []
        for W in weights:
            rows = sample_rows(W)
            Z = held.shift(W)[rows]
            D = fit.shift(W)[rows] @ torch.linalg.inv(fit.damped(candidate))
            confirmed, size = float((D * Z).sum()), float((D @ held.H * D).sum())
            s = min(1.0, max(0.0, confirmed / size)) if size else 0.0
            gain += (2 * s * confirmed - s**2 * size) / float((W[rows] @ held.H * W[rows]).sum())
            found.append(1 / (1 + (1 / s - 1) * fit.tokens / whole.tokens) if s else 0.0)
        if gain > best:
            best, ridge, parts = gain, candidate, found
    to_target = torch.linalg.inv(whole.damped(ridge)) @ whole.damped(0.01)
    return [
        (part * whole.shift(W) @ to_target).float() for part, W in zip(parts, weights, strict=True)
    ]


@pytest.mark.sampled(3)
@pytest.mark.parametrize("mode", ["true_sequential", "block"])
@pytest.mark.parametrize(
    ("name", "config"),
    [
        *(pytest.param(name, QUICK, id=f"{name}-textbook") for name in ARCHITECTURES),
        # Gradients have a test of their own (test_output_gradients.py).
        *(
            pytest.param(name, BEST.merged({"output_tokens": 0}), id=f"{name}-best")
            for name in STREAMS
        ),
    ],
)
def test_streaming_equals_the_plain_implementation(
    name: str,
    mode: Any,
    config: rw.QuantizeConfig,
    folder_of: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    rows = windows(16)
    result = rw.quantize(
        folder_of(name), tmp_path / "out", config, rows,
        samples=16, seq_len=32, batch_size=5, mode=mode,
    )  # fmt: skip
    assert result.mode == mode
    errors = {layer["name"]: layer["relative_error"] for layer in result.layers}
    ours = {layer.name: layer.read() for layer in quantized_layers(Checkpoint(result.output))}
    sequential = mode == "true_sequential"
    expected = Plain(folder_of(name), name, rows).run(ours, config, sequential=sequential)
    assert errors.keys() == expected.keys()
    same = total = 0
    for linear, theirs in expected.items():
        same += int((ours[linear].codes == theirs.codes).sum())
        total += theirs.codes.numel()
        assert errors[linear] == pytest.approx(theirs.relative_error, rel=0.03, abs=1e-7)
    # A code on a rounding tie may go either way, and changes those after it.
    assert same / total > 0.99


def test_the_two_modes_differ_from_the_second_group_on(llama: Path, tmp_path: Path) -> None:
    # Only the first group of the first block has the same inputs in both.
    results = [
        rw.quantize(llama, tmp_path / mode, QUICK, windows(), samples=4, seq_len=32, mode=mode)
        for mode in ("true_sequential", "block")
    ]
    sequential, block = ({x["name"]: x["relative_error"] for x in r.layers} for r in results)
    for name in ("q_proj", "k_proj", "v_proj"):
        assert sequential[f"model.layers.0.self_attn.{name}"] == pytest.approx(
            block[f"model.layers.0.self_attn.{name}"], rel=1e-5
        )
    assert sequential["model.layers.1.mlp.down_proj"] != block["model.layers.1.mlp.down_proj"]


def test_gptq_loses_less_than_rounding_to_nearest(llama: Path, tmp_path: Path) -> None:
    # Measured by the logits on the calibration windows.
    rows = windows(16)
    plain = transformers.AutoModelForCausalLM.from_pretrained(llama).eval()
    losses = {}
    with torch.no_grad():
        expected = plain(input_ids=torch.tensor(rows)).logits
        for method in ("gptq", "rtn"):
            config = rw.QuantizeConfig(group_size=32, bits=3, method=method)
            rw.quantize(llama, tmp_path / method, config, rows, samples=16, seq_len=32)
            model, _ = rw.load(tmp_path / method)
            losses[method] = float((model(input_ids=torch.tensor(rows)).logits - expected).norm())
    assert losses["gptq"] < 0.8 * losses["rtn"]


@NAMES
def test_other_tensors_are_copied_byte_for_byte(
    name: str, folder_of: Callable[[str], Path], quantized: Callable[..., Path]
) -> None:
    before, after = tensors_of(folder_of(name)), tensors_of(quantized(name))
    replaced = {f"{layer.name}.weight" for layer in quantized_layers(Checkpoint(quantized(name)))}
    model = transformers.AutoModelForCausalLM.from_config(ARCHITECTURES[name].config())
    assert replaced == {f"{n}.weight" for n in linear_names(model, ARCHITECTURES[name])}
    for tensor, value in before.items():
        if tensor in replaced:
            assert tensor not in after
        else:
            assert after[tensor].dtype == value.dtype
            assert raw(after[tensor]) == raw(value)
    added = {f"{t.removesuffix('weight')}{s}" for t in replaced for s in PARTS}
    assert after.keys() == (before.keys() - replaced) | added


PARTS = ("qweight", "qzeros", "scales", "g_idx")


@NAMES
def test_the_checkpoint_equals_a_dense_model_with_dequantized_weights(
    name: str, folder_of: Callable[[str], Path], quantized: Callable[..., Path]
) -> None:
    dense = transformers.AutoModelForCausalLM.from_pretrained(folder_of(name)).eval()
    for layer in quantized_layers(Checkpoint(quantized(name))):
        assign(dense, layer.name, layer.read().dequantize())
    model, tokenizer = rw.load(quantized(name))
    ids = torch.tensor(windows(seed=5))
    with torch.no_grad():
        torch.testing.assert_close(
            model(input_ids=ids).logits, dense(input_ids=ids).logits, rtol=1e-4, atol=1e-4
        )
    assert tokenizer is None


class TestSources:
    """Single and sharded files, with and without the prefix of the causal model, half precision."""

    def quantize(self, model: Path, out: Path) -> dict[str, torch.Tensor]:
        rw.quantize(model, out, QUICK, windows(), samples=4, seq_len=32)
        return tensors_of(out)

    def test_sharded(self, llama: Path, quantized: Callable[..., Path], tmp_path: Path) -> None:
        plain = transformers.AutoModelForCausalLM.from_pretrained(llama)
        plain.save_pretrained(tmp_path / "model", max_shard_size="100kB")
        assert len(list((tmp_path / "model").glob("*.safetensors"))) > 2
        ours = self.quantize(tmp_path / "model", tmp_path / "out")
        single = tensors_of(quantized("llama", recipe="textbook"))
        assert ours.keys() == single.keys()
        assert all(raw(ours[name]) == raw(single[name]) for name in single)

    @pytest.mark.parametrize("name", ["gpt2", "llama", "bloom"])
    @pytest.mark.parametrize("named", ["base", "causal"])
    def test_a_base_model_without_prefix(
        self, name: str, named: str, folder_of: Callable[[str], Path], tmp_path: Path
    ) -> None:
        base = transformers.AutoModel.from_pretrained(folder_of(name))
        base.save_pretrained(tmp_path / "model")
        before = tensors_of(tmp_path / "model")
        assert not any(n.startswith(("transformer.", "model.")) for n in before)
        if named == "causal":  # like the published GPT-2: the tensors are those of the base model
            causal = transformers.AutoModelForCausalLM.from_config(base.config)
            with edited_json(tmp_path / "model" / "config.json") as config:
                config["architectures"] = [type(causal).__name__]
            if name == "llama":
                # Its head is a separate tensor, which a base model does not have.
                with pytest.raises(rw.RoundwiseError, match=r"lacks lm_head\.weight"):
                    self.quantize(tmp_path / "model", tmp_path / "out")
                return
        after = self.quantize(tmp_path / "model", tmp_path / "out")
        kept = [n for n in before if n in after]
        assert kept
        assert all(raw(before[n]) == raw(after[n]) for n in kept)
        auto = transformers.AutoModel if named == "base" else transformers.AutoModelForCausalLM
        dense = auto.from_pretrained(tmp_path / "model").eval()
        prefix = "" if named == "base" else f"{dense.base_model_prefix}."
        for layer in quantized_layers(Checkpoint(tmp_path / "out")):
            assign(dense, prefix + layer.name, layer.read().dequantize())
        model, _ = rw.load(tmp_path / "out")
        ids = torch.tensor(windows(seed=5))
        with torch.no_grad():
            ours, theirs = model(input_ids=ids)[0], dense(input_ids=ids)[0]
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision(self, dtype: torch.dtype, llama: Path, tmp_path: Path) -> None:
        plain = transformers.AutoModelForCausalLM.from_pretrained(llama, dtype=dtype)
        plain.save_pretrained(tmp_path / "model")
        after = self.quantize(tmp_path / "model", tmp_path / "out")
        before = tensors_of(tmp_path / "model")
        assert raw(after["lm_head.weight"]) == raw(before["lm_head.weight"])
        assert after["model.layers.0.self_attn.q_proj.bias"].dtype == dtype
        model, _ = rw.load(tmp_path / "out")
        assert model.dtype == dtype


def test_the_seed_decides_the_bytes(text_model: Path, text: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        rw.quantize(
            text_model, tmp_path / name, BEST, str(text), samples=2, seq_len=64, seed=seed
        )  # fmt: skip
    a, b, c = (contents(tmp_path / name) for name in "abc")
    assert a == b
    a, c = (tensors_of(tmp_path / name) for name in "ac")
    blocks = {name.split(".")[2] for name in a if raw(a[name]) != raw(c[name])}
    assert blocks == {"0", "1", "2"}  # all


def test_figures_of_the_result(llama: Path, tmp_path: Path) -> None:
    result = rw.quantize(llama, tmp_path / "out", QUICK, windows(), samples=4, seq_len=32)
    assert result.output == tmp_path / "out"
    assert result.seconds > 0
    assert result.peak_rss_bytes > 10**6
    # 4 bits, a float16 scale and a 4-bit zero per 32 weights, and 32 bits of g_idx per input channel.
    stored = sum(
        8 * info.nbytes
        for layer in quantized_layers(Checkpoint(result.output))
        for info in layer.tensors.values()
    )
    weights = 2 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 96)
    assert result.bits_per_weight == pytest.approx(stored / weights)
    for folder, size in ((llama, result.bytes_before), (result.output, result.bytes_after)):
        assert size == sum(t.numel() * t.element_size() for t in tensors_of(folder).values())
    for layer in result.layers:
        assert layer["tokens"] == 128
        assert layer["damp_percent"] == 0.01
        assert layer["fallback"] is None
        assert 0 < layer["relative_error"] < 0.1


class TestOverrides:
    """Some modules have other settings than the rest."""

    def test_another_width_and_a_skipped_module(self, llama: Path, tmp_path: Path) -> None:
        dynamic = {r"down_proj$": {"bits": 8, "group_size": -1}, r"layers\.1\.self_attn": None}
        config = rw.QuantizeConfig(group_size=32, dynamic=dynamic)
        result = rw.quantize(llama, tmp_path / "out", config, windows(), samples=4, seq_len=32)
        widths = {layer["name"]: layer["bits"] for layer in result.layers}
        assert {n for n, bits in widths.items() if bits == 8} == {
            f"model.layers.{i}.mlp.down_proj" for i in (0, 1)
        }
        assert not any("layers.1.self_attn" in name for name in widths)
        assert any("4 of 14 linear layers are left as they are" in w for w in result.warnings)
        before, after = tensors_of(llama), tensors_of(tmp_path / "out")
        kept = "model.layers.1.self_attn.q_proj.weight"
        assert raw(after[kept]) == raw(before[kept])
        assert after["model.layers.0.mlp.down_proj.scales"].shape == (1, 64)
        dense = transformers.AutoModelForCausalLM.from_pretrained(llama).eval()
        for layer in quantized_layers(Checkpoint(tmp_path / "out")):
            assign(dense, layer.name, layer.read().dequantize())
        model, _ = rw.load(tmp_path / "out")
        ids = torch.tensor(windows())
        with torch.no_grad():
            torch.testing.assert_close(model(ids).logits, dense(ids).logits, rtol=1e-4, atol=1e-4)


def test_an_exception_of_a_callback_is_not_swallowed(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(Stop):
        rw.quantize(llama, tmp_path / "out", QUICK, windows(), progress=stop_after(1))
