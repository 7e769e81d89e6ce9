"""Layers with codes become QuantLinear, also in mixtures of experts; other files are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import roundwise as rw
from roundwise.checkpoint.gptq_format import encode, quantization_config
from roundwise.errors import CheckpointError
from roundwise.inference.quant_linear import QuantLinear
from roundwise.model.moe import LinearExperts
from tests.helpers import LLAMA, edited_json, random_model, tensors_of
from tests.inference.checkpoints import LAYER, logits, rewritten
from tests.matrix.tiny import tiny_model

CONFIG = rw.QuantizeConfig(group_size=32)
SMALL = {**LLAMA, "num_hidden_layers": 2}
MIXTURES: dict[str, Callable[[], transformers.PretrainedConfig]] = {
    "mixtral": lambda: transformers.MixtralConfig(
        **SMALL, num_local_experts=4, num_experts_per_tok=2
    ),
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(
        **SMALL, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32,
        decoder_sparse_step=1, norm_topk_prob=True,
    ),
    "qwen2_moe": lambda: transformers.Qwen2MoeConfig(
        **{k: v for k, v in SMALL.items() if k != "head_dim"}, num_experts=4, num_experts_per_tok=2,
        moe_intermediate_size=32, shared_expert_intermediate_size=64,
    ),
    "deepseek_v3": lambda: transformers.DeepseekV3Config(
        **{k: v for k, v in SMALL.items() if k not in ("head_dim", "num_key_value_heads")},
        n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, n_shared_experts=1,
        n_group=1, topk_group=1, first_k_dense_replace=1, q_lora_rank=32, kv_lora_rank=32,
        qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=16, num_key_value_heads=4,
    ),
}  # fmt: skip


def packed(folder: Path, out: Path, chosen: Callable[[str], bool]) -> Path:
    """`folder` with the chosen linear weights packed, and in `out/dense` the same ones dequantized."""
    tensors, dense, codes = {}, {}, 0
    for path in folder.glob("*.safetensors"):
        tensors |= load_file(path)
    dense |= tensors
    for name in [n for n in tensors if chosen(n)]:
        q = rw.round_to_nearest(tensors.pop(name).float(), CONFIG)
        dense[name] = q.dequantize()
        parts = encode(q, CONFIG)
        tensors |= {f"{name.removesuffix('.weight')}.{part}": t for part, t in parts.items()}
        codes += 1
    assert codes
    for target, content in ((out, tensors), (out / "dense", dense)):
        target.mkdir(parents=True, exist_ok=True)
        whole = {n: t.contiguous() for n, t in content.items()}
        save_file(whole, target / "model.safetensors", metadata={"format": "pt"})
        config = json.loads((folder / "config.json").read_text())
        if target == out:
            config["quantization_config"] = quantization_config(CONFIG, true_sequential=True)
        (target / "config.json").write_text(json.dumps(config))
    return out


def linear(name: str) -> bool:
    """Tells whether a tensor is the weight of a linear layer in a block, and not of a router."""
    parts = name.split(".")
    return parts[-1] == "weight" and (
        parts[-2].endswith("_proj") or parts[-2] in ("w1", "w2", "w3")
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    def made(name: str) -> Path:
        path = tmp_path_factory.mktemp("mixtures") / name
        random_model(MIXTURES[name]()).save_pretrained(path)
        return path

    return made


@pytest.mark.parametrize("name", MIXTURES)
def test_computes_as_the_dense_model(
    name: str, folder: Callable[[str], Path], tmp_path: Path
) -> None:
    out = packed(folder(name), tmp_path / "out", linear)
    model, _ = rw.load(out)
    experts = [m for m in model.modules() if isinstance(m, LinearExperts)]
    assert len(experts) == (1 if name == "deepseek_v3" else 2)
    assert sum(isinstance(m, QuantLinear) for m in experts[0].modules()) == 12
    assert not any(p.ndim == 3 for p in model.parameters())
    plain = transformers.AutoModelForCausalLM.from_pretrained(out / "dense").eval()
    torch.testing.assert_close(logits(model), logits(plain), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_saved_and_loaded_again(name: str, folder: Callable[[str], Path], tmp_path: Path) -> None:
    out = packed(folder(name), tmp_path / "out", linear)
    model, _ = rw.load(out)
    model.save_pretrained(tmp_path / "again")
    before, after = load_file(out / "model.safetensors"), {}
    for path in (tmp_path / "again").glob("*.safetensors"):
        after |= load_file(path)
    assert set(before) == set(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(logits(rw.load(tmp_path / "again")[0]), logits(model))


def test_unquantized_experts_are_not_replaced(
    folder: Callable[[str], Path], tmp_path: Path
) -> None:
    out = packed(folder("mixtral"), tmp_path / "out", lambda n: linear(n) and "experts" not in n)
    model, _ = rw.load(out)
    assert not any(isinstance(m, LinearExperts) for m in model.modules())
    plain = transformers.AutoModelForCausalLM.from_pretrained(out / "dense").eval()
    torch.testing.assert_close(logits(model), logits(plain), rtol=1e-3, atol=1e-3)


def test_generates(folder: Callable[[str], Path], tmp_path: Path) -> None:
    model, _ = rw.load(packed(folder("mixtral"), tmp_path / "out", linear))
    ids = torch.tensor([[3, 14, 15]])
    output = model.generate(ids, max_new_tokens=5, do_sample=False, eos_token_id=None)
    with torch.no_grad():
        for _ in range(5):
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    assert output.tolist() == ids.tolist()


def test_only_some_experts_are_quantized(folder: Callable[[str], Path], tmp_path: Path) -> None:
    out = packed(
        folder("mixtral"), tmp_path / "out", lambda n: linear(n) and "experts.3.w1" not in n
    )
    with pytest.raises(CheckpointError, match=r"experts\.3 has no quantized gate projection"):
        rw.load(out)


def test_more_experts_than_the_model_has(folder: Callable[[str], Path], tmp_path: Path) -> None:
    out = packed(folder("mixtral"), tmp_path / "out", linear)
    with edited_json(out / "config.json") as config:
        config["num_local_experts"] = 3
    with pytest.raises(CheckpointError, match="more than the model's 3 experts"):
        rw.load(out)


def test_uneven_groups_without_a_g_idx(quantized: Callable[..., Path], tmp_path: Path) -> None:
    def cut(tensors: dict[str, torch.Tensor]) -> None:
        name = LAYER
        del tensors[f"{name}.g_idx"]
        for part in ("scales", "qzeros"):
            tensors[f"{name}.{part}"] = tensors[f"{name}.{part}"].repeat(3, 1)[:5].contiguous()

    folder = rewritten(quantized("llama"), tmp_path / "out", cut)
    with pytest.raises(CheckpointError, match="has 5 groups of its 96 input channels"):
        rw.load(folder)


@pytest.mark.parametrize(
    ("suffix", "shape", "says"),
    [
        ("qweight", (8, 64), "g_idx has shape"),
        ("qweight", (12, 32), "do not fit together"),
        ("qweight", (12,), "must be matrices"),
        ("qzeros", (3, 7), "do not fit together"),
        ("qzeros", (2, 8), "do not fit together"),
        ("scales", (3, 32), "do not fit together"),
        ("scales", (0, 64), "must be matrices"),
        ("g_idx", (95,), "g_idx has shape"),
        ("qzeros", None, "lacks qzeros"),
        ("scales", None, "lacks scales"),
    ],
)
def test_wrong_shapes(
    suffix: str,
    shape: tuple[int, ...] | None,
    says: str,
    quantized: Callable[..., Path],
    tmp_path: Path,
) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        old = tensors.pop(f"{LAYER}.{suffix}")
        if shape is not None:
            tensors[f"{LAYER}.{suffix}"] = torch.zeros(shape, dtype=old.dtype)

    folder = rewritten(quantized("llama"), tmp_path / "out", change)
    with pytest.raises(CheckpointError, match=says):
        rw.load(folder)


def test_a_layer_that_the_model_does_not_have(
    quantized: Callable[..., Path], tmp_path: Path
) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for suffix in ("qweight", "qzeros", "scales", "g_idx"):
            tensors[f"model.layers.9.mlp.down_proj.{suffix}"] = tensors[f"{LAYER}.{suffix}"].clone()

    folder = rewritten(quantized("llama"), tmp_path / "out", change)
    with pytest.raises(CheckpointError, match=r"layers\.9\.mlp\.down_proj.*no such layer"):
        rw.load(folder)


def test_draft_layers_of_other_tools_are_left_out(
    folder: Callable[[str], Path], tmp_path: Path
) -> None:
    """DeepSeek-V3's class ignores layer 61, the draft layer, whether it is dense or quantized."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for key in [key for key in tensors if key.startswith("model.layers.1.")]:
            tensors[key.replace(".1.", ".61.", 1)] = tensors[key].clone()

    plain = packed(folder("deepseek_v3"), tmp_path / "plain", linear)
    drafted = rewritten(plain, tmp_path / "drafted", change)
    assert any("layers.61.self_attn.o_proj.qweight" in key for key in tensors_of(drafted))
    assert torch.equal(logits(rw.load(drafted)[0]), logits(rw.load(plain)[0]))


RTN = rw.QuantizeConfig(method="rtn", group_size=32)


def test_computed_buffers_around_quantized_layers_are_filled(tmp_path: Path) -> None:
    """Falcon-H1's model fills the buffers of its layers, so it must still be initialized."""
    plain = tiny_model("FalconH1ForCausalLM")
    plain.save_pretrained(tmp_path / "model")
    rw.quantize(tmp_path / "model", tmp_path / "out", RTN)
    buffers = dict(rw.load(tmp_path / "out")[0].named_buffers())
    computed = dict(plain.named_non_persistent_buffers())
    assert any("mup_vector" in name for name in computed)
    for name, expected in computed.items():
        assert torch.equal(buffers[name], expected.to(buffers[name].dtype)), name


@pytest.mark.parametrize("name", ["BltForCausalLM", "Qwen3OmniMoeThinkerForConditionalGeneration"])
def test_classes_that_initialize_weights_of_layers_below_them(name: str, tmp_path: Path) -> None:
    tiny_model(name).save_pretrained(tmp_path / "model")
    rw.quantize(tmp_path / "model", tmp_path / "out", RTN)
    model, _ = rw.load(tmp_path / "out")
    assert any(isinstance(module, QuantLinear) for module in model.modules())
