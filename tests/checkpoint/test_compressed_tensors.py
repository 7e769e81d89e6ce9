"""The compressed-tensors library reads what roundwise writes, and the reverse, without loss."""

import json
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import roundwise as rw
from roundwise.checkpoint.compressed_tensors import (
    SUFFIXES,
    is_supported,
    pack_rows,
    parse_targets,
    unpack_rows,
    width_of,
)
from roundwise.checkpoint.quantization_config import (
    parse_quantization_config,
    read_quantization_config,
)
from roundwise.checkpoint.quantized_layers import quantized_layers
from roundwise.checkpoint.reader import Checkpoint
from roundwise.convert import convert
from roundwise.core.quantized_weight import WIDTHS
from roundwise.errors import CheckpointError, ConfigError
from roundwise.verify import audit
from tests.helpers import edited_json, raw, tensors_of, windows

LIBRARY_VERSION = tuple(map(int, version("compressed-tensors").split(".")[:2]))
pytestmark = pytest.mark.skipif(
    LIBRARY_VERSION < (0, 18),
    reason="needs compressed-tensors 0.18, the first that leaves no gaps in 3, 5, 6 and 7 bits",
)
LIBRARY = BaseCompressor.get_value_from_registry("pack-quantized")


def decoded(folder: Path) -> dict[str, torch.Tensor]:
    return {layer.name: layer.read().dequantize() for layer in quantized_layers(Checkpoint(folder))}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def settings_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def scheme(bits: int, size: int, sym: bool) -> QuantizationScheme:
    group = {"strategy": "group", "group_size": size} if size > 0 else {"strategy": "channel"}
    return QuantizationScheme(
        targets=["Linear"], weights=QuantizationArgs(num_bits=bits, symmetric=sym, **group)
    )


@settings(max_examples=60, deadline=None)
@given(
    bits=st.sampled_from(WIDTHS), rows=st.integers(1, 40), columns=st.integers(1, 100),
    seed=st.integers(0, 9),
)  # fmt: skip
def test_rows_are_packed_as_the_library_packs_them(bits, rows, columns, seed):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(2**bits, (rows, columns), generator=generator, dtype=torch.uint8)
    signed = (codes.to(torch.int32) - 2 ** (bits - 1)).to(torch.int8)
    words = pack_rows(codes, bits).clone(memory_format=torch.contiguous_format)
    assert torch.equal(words, pack_to_int32(signed, bits))
    assert torch.equal(unpack_rows(words, bits, columns), codes)
    assert torch.equal(unpack_from_int32(words, bits, torch.Size((rows, columns))), signed)
    assert width_of(words.shape[1], columns, bits) == bits


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("sym", [True, False])
def test_a_run_writes_what_the_library_writes(bits, sym, quantized):
    """The same codes as a GPTQ file of the same run, packed by the library to the same bytes."""
    options = {"bits": bits, "sym": sym, "group_size": 32, "recipe": "textbook"}
    packed = quantized("llama", **options, format="compressed-tensors")
    codes = quantized("llama", **options, format="gptq_v2")
    assert same(decoded(packed), decoded(codes))
    tensors = tensors_of(packed)
    for layer in quantized_layers(Checkpoint(codes)):
        q, middle = layer.read(), 2 ** (bits - 1)
        state = {
            "weight": q.dequantize(), "weight_scale": q.scales.float(),
            "weight_zero_point": (q.zeros - middle).to(torch.int8),
        }  # fmt: skip
        theirs = LIBRARY.compress(state, scheme(bits, 32, sym))
        theirs["weight_scale"] = q.scales
        ours = {key: tensors.get(f"{layer.name}.{key}") for key in SUFFIXES}
        assert {key for key, value in ours.items() if value is not None} == {*theirs}
        assert all(torch.equal(ours[key], value) for key, value in theirs.items())
    assert not audit(packed).failures
    stated = QuantizationConfig(**settings_of(packed))
    assert stated.config_groups["group_0"].weights.num_bits == bits
    assert stated.ignore == ["lm_head"]
    assert settings_of(packed)["meta"]["method"] == "gptq"
    assert not (packed / "quantize_config.json").exists()


@pytest.mark.sampled(3)
@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("group_size", [32, -1])
def test_conversion_and_back_is_exact(bits, sym, group_size, quantized, tmp_path):
    source = quantized(
        "llama", bits=bits, sym=sym, group_size=group_size, format="gptq_v2", recipe="textbook"
    )
    convert(source, tmp_path / "packed", "compressed-tensors")
    assert same(decoded(source), decoded(tmp_path / "packed"))
    weights = settings_of(tmp_path / "packed")["config_groups"]["group_0"]["weights"]
    assert (weights["num_bits"], weights["symmetric"]) == (bits, sym)
    # Each layer as the library itself decodes it.
    tensors = tensors_of(tmp_path / "packed")
    for name, W in decoded(source).items():
        state = {
            part: tensors[f"{name}.{part}"] for part in SUFFIXES if f"{name}.{part}" in tensors
        }
        state["weight_scale"] = state["weight_scale"].float()
        theirs = LIBRARY.decompress(state, scheme(bits, group_size, sym))["weight"]
        assert torch.equal(theirs, W)
    convert(tmp_path / "packed", tmp_path / "back", "gptq_v2")
    old, new = tensors_of(source), tensors_of(tmp_path / "back")
    assert old.keys() == new.keys()
    assert all(raw(old[name]) == raw(new[name]) for name in old)
    assert not audit(tmp_path / "back").failures
    settings = settings_of(tmp_path / "back")
    assert (settings["bits"], settings["group_size"], settings["sym"]) == (bits, group_size, sym)
    convert(tmp_path / "packed", tmp_path / "dense", "dense", dtype=torch.float32)
    dense = tensors_of(tmp_path / "dense")
    assert all(torch.equal(dense[f"{name}.weight"], W) for name, W in decoded(source).items())


#: Loads a checkpoint with transformers and the library alone: importing roundwise would replace them.
THEIRS = """
import sys, torch, transformers
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
with torch.no_grad():
    torch.save(model(input_ids=torch.load(sys.argv[2])).logits, sys.argv[3])
assert "roundwise" not in sys.modules
"""


# Asymmetric checkpoints cannot be tested: transformers with this release of the library expects zero
# points that are not packed, so it cannot load even those that the library wrote.
@pytest.mark.sampled(3)
@pytest.mark.parametrize("bits", [3, 4])
def test_transformers_loads_it(bits, quantized, tmp_path):
    packed = quantized(
        "llama", bits=bits, group_size=32, recipe="textbook", format="compressed-tensors",
        dynamic={"o_proj": {"bits": 8}, r"0\.self_attn\.v_proj": None},
    )  # fmt: skip
    ids = torch.tensor(windows(seed=5))
    torch.save(ids, tmp_path / "ids")
    command = [sys.executable, "-c", THEIRS, packed, tmp_path / "ids", tmp_path / "logits"]
    subprocess.run(command, check=True)
    ours, _ = rw.load(packed, dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(
            torch.load(tmp_path / "logits"), ours(input_ids=ids).logits, rtol=1e-3, atol=1e-3
        )


def test_layers_with_different_settings(quantized, tmp_path):
    source = quantized(
        "llama", group_size=32, recipe="textbook", format="gptq_v2",
        dynamic={"down_proj": {"bits": 8}, r"0\.self_attn\.o_proj": None},
    )  # fmt: skip
    convert(source, tmp_path / "packed", "compressed-tensors")
    settings = settings_of(tmp_path / "packed")
    assert settings["ignore"] == ["lm_head", "model.layers.0.self_attn.o_proj"]
    usual, other = settings["config_groups"].values()
    assert (usual["weights"]["num_bits"], other["weights"]["num_bits"]) == (4, 8)
    assert other["targets"] == [f"model.layers.{index}.mlp.down_proj" for index in range(2)]
    convert(tmp_path / "packed", tmp_path / "back", "gptq_v2")
    assert same(decoded(source), decoded(tmp_path / "back"))
    ids = torch.tensor(windows(seed=5))
    with torch.no_grad():
        one, two = (
            rw.load(folder)[0](input_ids=ids).logits for folder in (source, tmp_path / "back")
        )
    assert torch.equal(one, two)


@pytest.mark.parametrize("g_idx", [False, True])
def test_what_the_library_writes_is_read(g_idx, llama, tmp_path):
    """A folder as llm-compressor writes it, with tensors made by the library and bfloat16 scales."""
    tensors = load_file(llama / "model.safetensors")
    expected = {}
    for name in [n for n in tensors if n.endswith("_proj.weight")]:
        W, stem = tensors.pop(name).float(), name.removesuffix(".weight")
        groups = W.reshape(len(W), -1, 32)
        scale = ((groups.amax(-1) - groups.amin(-1)) / 15).to(torch.bfloat16).float()
        zero = (-8 - groups.amin(-1) / scale).round().clamp(-8, 7).to(torch.int8)
        state = {"weight": W, "weight_scale": scale, "weight_zero_point": zero}
        packed = LIBRARY.compress(state, scheme(4, 32, False))
        expected[stem] = LIBRARY.decompress(packed, scheme(4, 32, False))["weight"]
        packed["weight_scale"] = scale.to(torch.bfloat16)
        if g_idx:
            packed["weight_g_idx"] = torch.arange(W.shape[1], dtype=torch.int32) // 32
        tensors |= {f"{stem}.{key}": value.contiguous() for key, value in packed.items()}
    (tmp_path / "packed").mkdir()
    save_file(tensors, tmp_path / "packed" / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((llama / "config.json").read_text())
    weights = scheme(4, 32, False).model_dump(mode="json")
    config["quantization_config"] = {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": ["lm_head"],
        "config_groups": {"group_0": weights}, "quantization_status": "compressed",
    }  # fmt: skip
    (tmp_path / "packed" / "config.json").write_text(json.dumps(config))
    assert same(decoded(tmp_path / "packed"), expected)
    rw.load(tmp_path / "packed")
    convert(tmp_path / "packed", tmp_path / "out", "gptq_v2")
    assert same(decoded(tmp_path / "out"), expected)
    rw.load(tmp_path / "out")


def test_act_order_is_refused(quantized, tmp_path):
    source = quantized("llama", recipe="textbook", desc_act=True)
    with pytest.raises(ConfigError, match="desc_act=True"):
        convert(source, tmp_path / "packed", "compressed-tensors")
    assert not (tmp_path / "packed").exists()
    with pytest.raises(ConfigError, match="dropped act-order: use desc_act=False"):
        rw.QuantizeConfig(format="compressed-tensors", desc_act=True)
    with pytest.raises(ConfigError, match="dropped act-order"):
        rw.QuantizeConfig(format="compressed-tensors", dynamic={"q_proj": {"desc_act": True}})


def test_a_conv1d_is_refused(folder_of, quantized, tmp_path):
    with pytest.raises(ConfigError, match="is a Conv1D"):
        convert(quantized("gpt2", recipe="textbook"), tmp_path / "packed", "compressed-tensors")
    config = rw.QuantizeConfig(method="rtn", group_size=32, format="compressed-tensors")
    with pytest.raises(ConfigError, match="are Conv1D, which compressed-tensors does not support"):
        rw.quantize(folder_of("gpt2"), tmp_path / "out", config)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("name", "bits"), [("qwen2_moe", 3), ("mixtral", 3), ("deepseek_v3", 4)])
def test_experts_and_their_routers(name, bits, quantized):
    options = {"method": "rtn", "bits": bits, "sym": False}
    packed = quantized(name, **options, format="compressed-tensors")
    source = quantized(name, **options, format="gptq_v2")
    assert same(decoded(packed), decoded(source))
    ignored = settings_of(packed)["ignore"]
    assert "model.layers.1.mlp.gate" in ignored
    assert ("model.layers.1.block_sparse_moe.gate" in ignored) == (name == "mixtral")
    ids = torch.tensor(windows(seed=5))
    with torch.no_grad():
        one, two = (rw.load(folder)[0](input_ids=ids).logits for folder in (source, packed))
    assert torch.equal(one, two)


def test_a_quantized_head_is_named(copy_of, tmp_path):
    """vLLM's class of the head is not called Linear, so the head needs a target of its own."""
    config = rw.QuantizeConfig(
        method="rtn", group_size=32, lm_head=True, format="compressed-tensors"
    )
    rw.quantize(copy_of("llama"), tmp_path / "out", config)
    group = settings_of(tmp_path / "out")["config_groups"]["group_0"]
    assert group["targets"] == ["Linear", "lm_head"]
    assert settings_of(tmp_path / "out")["ignore"] == []
    assert "lm_head" in decoded(tmp_path / "out")
    assert not audit(tmp_path / "out", against=Checkpoint(tmp_path / "llama")).failures


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"format": "nvfp4-pack-quantized"}, "only pack-quantized is supported"),
        ({"kv_cache_scheme": {"num_bits": 8}}, "more than weights"),
        (
            {"config_groups": {"group_0": {"input_activations": {"num_bits": 8}}}},
            "more than weights",
        ),
    ],
)
def test_unsupported_sources_are_refused(changes, why, quantized, tmp_path):
    source = quantized("llama", group_size=32, recipe="textbook")
    convert(source, tmp_path / "packed", "compressed-tensors")
    with edited_json(tmp_path / "packed" / "config.json") as config:
        config["quantization_config"] |= changes
    with pytest.raises(ConfigError, match=why):
        convert(tmp_path / "packed", tmp_path / "out", "gptq")


@pytest.mark.parametrize("part", ["weight_packed", "weight_scale", "weight_shape"])
def test_contradicting_shapes_are_refused(part, quantized, tmp_path):
    source = quantized("llama", group_size=32, recipe="textbook")
    convert(source, tmp_path / "packed", "compressed-tensors")
    file = tmp_path / "packed" / "model.safetensors"
    tensors = load_file(file)
    name = f"model.layers.0.mlp.up_proj.{part}"
    tensors[name] = tensors[name][:-1].clone() if part != "weight_shape" else torch.tensor([7, 7])
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="fit together"):
        convert(tmp_path / "packed", tmp_path / "out", "gptq")


def test_other_formats_of_the_library_are_left_to_it():
    assert is_supported({"config_groups": {}, "format": "pack-quantized"})
    assert not is_supported({"format": "float-quantized"})
    floats = {"weights": {"num_bits": 4, "type": "float"}, "targets": ["Linear"]}
    assert not is_supported({"format": "pack-quantized", "config_groups": {"group_0": floats}})


def test_names_come_before_patterns_and_patterns_before_classes():
    def group(bits, *targets):
        return {"targets": [*targets], "weights": {"num_bits": bits, "group_size": 32}}

    raw = {
        "quant_method": "compressed-tensors",
        "config_groups": {
            "a": group(4, "Linear"), "b": group(8, "re:.*mlp.*"), "c": group(2, "layers.0.mlp.up"),
        },
        "ignore": ["lm_head", "re:.*gate$"],
    }  # fmt: skip
    targets = parse_targets(raw, "folder")
    assert (targets.default.bits, targets.names["layers.0.mlp.up"].bits) == (4, 2)
    config = parse_quantization_config(raw, "folder")
    layers = {
        "layers.0.mlp.up": 2, "model.layers.0.mlp.up": 2, "layers.1.mlp.up": 8, "layers.1.q": 4,
    }  # fmt: skip
    assert {name: config.for_layer(name)[0].bits for name in layers} == layers
    assert config.for_layer("lm_head") == config.for_layer("layers.0.mlp.gate")[:1] == [None]
    again = rw.QuantizeConfig(bits=4, dynamic=config.overrides())
    assert {name: again.for_module(name).bits for name in layers} == layers
    assert again.for_module("lm_head") is None and again.for_module("layers.0.mlp.gate") is None


class TestContradictions:
    """Tensors are held against the config and each other, as those of the GPTQ format."""

    NAME = "model.layers.0.mlp.down_proj"

    def weights(self, **changes: Any) -> dict[str, Any]:
        group = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group"}
        return {**group, "group_size": 32, **changes}

    def read(self, folder: Path, **changes: Any) -> None:
        with edited_json(folder / "config.json") as config:
            group = config["quantization_config"]["config_groups"]["group_0"]
            group["weights"] = self.weights(**changes)
        convert(folder, folder / "out", "gptq")

    @pytest.fixture
    def packed(self, quantized: Callable[..., Path], tmp_path: Path) -> Path:
        source = quantized("llama", recipe="textbook")
        return convert(source, tmp_path / "packed", "compressed-tensors")

    def test_a_good_one(self, packed: Path) -> None:
        self.read(packed, num_bits="4", symmetric="true")

    @pytest.mark.parametrize(
        ("changes", "says"),
        [
            ({"num_bits": 8}, "codes of 4 bits, but the config says bits=8"),
            (
                {"group_size": 64},
                "3 groups of its 96 .* config says group_size=64|2 groups of its 64",
            ),
            ({"group_size": None, "strategy": "channel"}, "config says group_size=-1"),
            ({"symmetric": False}, "has no weight_zero_point, but the config says symmetric=false"),
            ({"num_bits": "x"}, "num_bits='x': it must be a whole number"),
        ],
    )
    def test_another_config(self, changes: dict[str, Any], says: str, packed: Path) -> None:
        with pytest.raises(CheckpointError, match=says):
            self.read(packed, **changes)

    @pytest.mark.parametrize(
        ("suffix", "change", "says"),
        [
            ("weight_packed", lambda t: t.long(), "weight_packed is I64, but must be I32"),
            ("weight_scale", lambda t: t.int(), "weight_scale is I32"),
            ("weight_shape", lambda t: t.float(), "weight_shape is F32"),
            ("weight_shape", lambda t: t[:1], "does not hold two numbers"),
            ("weight_scale", lambda t: t * 0, "a scale that is zero or not finite"),
            ("weight_scale", lambda t: t / 0, "a scale that is zero or not finite"),
        ],
    )
    def test_other_tensors(self, suffix: str, change: Any, says: str, packed: Path) -> None:
        file = packed / "model.safetensors"
        tensors = load_file(file)
        tensors[f"{self.NAME}.{suffix}"] = change(tensors[f"{self.NAME}.{suffix}"])
        save_file(tensors, file, {"format": "pt"})
        with pytest.raises(CheckpointError, match=says):
            self.read(packed)

    def test_zero_points_of_a_symmetric_layer(
        self, quantized: Callable[..., Path], tmp_path: Path
    ) -> None:
        source = quantized("llama", sym=False, format="gptq", recipe="textbook")
        packed = convert(source, tmp_path / "packed", "compressed-tensors")
        with pytest.raises(
            CheckpointError, match="beside the middle, but the config says symmetric"
        ):
            self.read(packed)

    def test_a_group_that_names_a_layer_comes_before_one_for_all(self, packed: Path) -> None:
        with edited_json(packed / "config.json") as config:
            groups = config["quantization_config"]["config_groups"]
            wide = {**groups["group_0"], "weights": self.weights(num_bits=8)}
            groups["group_1"] = {**wide, "targets": ["re:.*layers.1.mlp.*"]}
        config = read_quantization_config(Checkpoint(packed))
        assert config.for_layer(self.NAME)[0].bits == 4
        assert config.for_layer("model.layers.1.mlp.down_proj")[0].bits == 8
