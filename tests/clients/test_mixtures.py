"""Clients load our mixtures of experts, and compute what the weights in the files say.

The models are small and random: what a client could get wrong is the names, the layout and the order of
experts and projections, and any of that gives other logits altogether. vLLM is asked for the two whose
routers its kernel for CPUs knows. The reference is the independent
reader's dense weights in transformers' own model, in float32; how near a client must be is what float16
itself costs in that model.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from numpy.typing import NDArray
from safetensors.torch import save_file

import roundwise
from tests.clients import reference
from tests.clients.conftest import MODEL, Client
from tests.helpers import random_model

pytestmark = pytest.mark.clients

SIZES: dict[str, Any] = {
    "vocab_size": 4096, "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 512, "num_experts_per_tok": 2,
}  # fmt: skip
GROUPED = {**SIZES, "num_key_value_heads": 2, "head_dim": 64}
CONFIGS: dict[str, Callable[[], transformers.PretrainedConfig]] = {
    "mixtral": lambda: transformers.MixtralConfig(**GROUPED, num_local_experts=4),
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(
        **GROUPED, num_experts=4, moe_intermediate_size=128, norm_topk_prob=True
    ),
    "deepseek_v3": lambda: transformers.DeepseekV3Config(
        **SIZES, num_key_value_heads=4, n_routed_experts=4, moe_intermediate_size=128, n_group=1,
        topk_group=1, topk_method="noaux_tc", first_k_dense_replace=1, q_lora_rank=128, kv_lora_rank=128,
        qk_nope_head_dim=32, qk_rope_head_dim=32, v_head_dim=64,
    ),
    "gpt_oss": lambda: transformers.GptOssConfig(**GROUPED, num_local_experts=4),
}  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A mixture quantized to 4 bits with groups of 128; each is made once."""
    folders: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in folders:
            folder = tmp_path_factory.mktemp(name)
            random_model(CONFIGS[name]()).to(torch.bfloat16).save_pretrained(folder / "model")
            for path in MODEL.glob("tokenizer*.json"):
                shutil.copy(path, folder / "model")
            generator = torch.Generator().manual_seed(0)
            ids = torch.randint(3, 4096, (8, 128), generator=generator).tolist()
            roundwise.quantize(folder / "model", folder / "out", None, ids, samples=8, seq_len=128)
            folders[name] = folder / "out"
        return folders[name]

    return make


def dense_model(checkpoint: Path, scratch: Path, dtype: torch.dtype) -> Any:
    """Transformers' own model with the independent reader's weights."""
    tensors = {
        name: torch.from_numpy(np.ascontiguousarray(W))
        for name, W in reference.read_dense(checkpoint).items()
    }
    config = json.loads((checkpoint / "config.json").read_text())
    del config["quantization_config"]
    if (
        config["model_type"] == "gpt_oss"
    ):  # whose files hold all experts in one tensor, as [in, out]
        for layer in range(2):
            path = f"model.layers.{layer}.mlp.experts"
            for kind, end in (("weight", ""), ("bias", "_bias")):

                def take(role: str, path: str = path, kind: str = kind) -> torch.Tensor:
                    parts = [tensors.pop(f"{path}.{e}.{role}_proj.{kind}").t() for e in range(4)]
                    return torch.stack(parts)

                both = torch.cat([take("gate"), take("up")], dim=-1)
                tensors[f"{path}.gate_up_proj{end}"] = both.contiguous()
                tensors[f"{path}.down_proj{end}"] = take("down").contiguous()
    scratch.mkdir(exist_ok=True)
    save_file(tensors, scratch / "model.safetensors", {"format": "pt"})
    (scratch / "config.json").write_text(json.dumps(config))
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        scratch, dtype=dtype, output_loading_info=True, attn_implementation="eager"
    )
    assert not any(report.values())
    return model.eval()


def judge(
    found: NDArray[Any],
    checkpoint: Path,
    windows: NDArray[np.int64],
    scratch: Path,
    note: Callable[[str], None],
    dtype: torch.dtype = torch.float16,
) -> None:
    """Fails unless log-probabilities are about as near to float32 as `dtype` is in the plain model.

    Per token: where two experts are equally good to it, rounding decides, so a few may be far away.
    """
    exact, plain = (
        reference.logits(dense_model(checkpoint, scratch, t), windows)
        for t in (torch.float32, dtype)
    )
    found, exact, plain = (
        torch.log_softmax(torch.from_numpy(x), dim=-1) for x in (found, exact, plain)
    )
    apart, noise = ((x - exact).abs().amax(-1) for x in (found, plain))
    best = exact.topk(2).values
    clear = best[..., 0] - best[..., 1] > 4 * noise.median()
    same = (found.argmax(-1) == exact.argmax(-1))[clear].float().mean()
    note(
        f"median {apart.median():.4f} (plain {noise.median():.4f}), "
        f"same top-1 {same:.4f} of the {clear.float().mean():.0%} clear"
    )
    assert clear.float().mean() > 0.2  # random models: enough tokens to compare
    assert apart.median() <= 2 * noise.median()
    assert apart.quantile(0.9) <= 3 * noise.quantile(0.9)
    assert same >= 0.98


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_gptqmodel_computes_what_we_wrote(
    name: str, made: Callable[[str], Path], gptqmodel: Client, windows: NDArray[np.int64],
    tmp_path: Path, finding: Callable[[str], None],
) -> None:  # fmt: skip
    answer = gptqmodel(made(name))
    judge(answer["logits"], made(name), windows, tmp_path / "dense", finding)


def test_gptqmodel_looks_for_mixtrals_experts_under_other_names_than_everyone(
    made: Callable[[str], Path], gptqmodel: Client
) -> None:
    """Should this fail, it has learned them: judge it above, and tell users in `plan`."""
    with pytest.raises(RuntimeError, match=r"Missing required .*mlp\.experts\.0\.down_proj"):
        gptqmodel(made("mixtral"))


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
@pytest.mark.usefixtures("vllm_kernels")
def test_vllm_computes_what_we_wrote(
    name: str, made: Callable[[str], Path], vllm: Client, windows: NDArray[np.int64],
    tmp_path: Path, finding: Callable[[str], None],
) -> None:  # fmt: skip
    answer = vllm(made(name), "--dtype", "bfloat16", "--experts-anywhere")
    judge(answer["logprobs"], made(name), windows, tmp_path / "dense", finding, torch.bfloat16)


@pytest.mark.usefixtures("vllm_kernels")
def test_vllm_refuses_experts_without_amx(made: Callable[[str], Path], vllm: Client) -> None:
    if torch.cpu._is_amx_tile_supported():
        pytest.skip("this processor has AMX tiles")
    with pytest.raises(RuntimeError, match="No WNA16 MoE backend supports"):
        vllm(made("qwen3_moe"), "--dtype", "bfloat16")
