"""The engines that `plan` names for a model and settings, held against a table written by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers
from safetensors.torch import save_file

import roundwise as rw
from roundwise.model.rotate import open_for_run
from roundwise.plan import cost_model
from roundwise.plan.plan import Plan, plan
from roundwise.system.device import HOST
from tests.engine_answers import assert_answers
from tests.helpers import LLAMA, random_model

COMPRESSED = {"format": "compressed-tensors"}
#: Model, settings -> answers, as `assert_answers` reads them. Asymmetric files are gptq_v2 unless gptq
#: is asked for. "wide" is a Llama that takes every group size; qwen3_5_moe stores its experts fused, but
#: the GPTQ files of its publisher do not.
TRUTH: list[tuple[str, dict[str, Any], str]] = [
    ("wide", {}, "yes yes yes L yes yes yes"),
    ("wide", {"group_size": 64}, "yes yes yes L yes yes yes"),
    ("wide", {"group_size": -1}, "yes yes yes L yes yes yes"),
    ("wide", {"group_size": 16}, "C HC H no yes yes yes"),
    ("wide", {"group_size": 256}, "C HC H L yes yes yes"),
    ("wide", {"bits": 2}, "no HC H L no yes yes"),
    ("wide", {"bits": 3}, "no HC H L no yes yes"),
    ("wide", {"bits": 5}, "no HC H L no no yes"),
    ("wide", {"bits": 6}, "no HC H L no no yes"),
    ("wide", {"bits": 7}, "no HC H L no no yes"),
    ("wide", {"bits": 8}, "no yes yes L no yes yes"),
    ("wide", {"sym": False}, "C HC HC L yes yes yes"),
    ("wide", {"sym": False, "format": "gptq"}, "C HC HC L yes no yes"),
    ("wide", {"sym": False, "bits": 3}, "no HC H L no yes yes"),
    ("wide", {"sym": False, "bits": 8}, "no HC HC no no yes yes"),
    ("wide", {"desc_act": True}, "no no no no yes yes yes"),
    ("wide", {"desc_act": True, "group_size": -1}, "yes yes yes L yes yes yes"),
    ("wide", {"method": "rtn"}, "yes yes yes L yes yes yes"),
    ("wide", {"rotate": True}, "yes yes yes L yes yes yes"),
    ("wide", COMPRESSED, "yes yes yes L G G yes"),
    ("wide", COMPRESSED | {"sym": False}, "yes yes yes L G G yes"),
    ("wide", COMPRESSED | {"bits": 3}, "no yes GH L no G yes"),
    ("wide", COMPRESSED | {"bits": 6}, "no yes GH L no no yes"),
    ("wide", COMPRESSED | {"bits": 8}, "no yes yes L no G yes"),
    ("wide", COMPRESSED | {"group_size": 16}, "yes yes GH no G G yes"),
    ("wide", {"lm_head": True}, "yes yes yes L yes yes yes"),
    ("wide", {"lm_head": True, "bits": 3}, "no C no L no yes yes"),
    ("wide", {"dynamic": {"o_proj": None}}, "yes yes yes L yes yes yes"),
    ("wide", {"dynamic": {"o_proj": {"bits": 8}}}, "no yes yes L no yes yes"),
    ("wide", {"dynamic": {"o_proj": {"bits": 3}}}, "no HC H L no yes yes"),
    ("wide", {"dynamic": {"q_proj": {"bits": 8}}}, "no no no L no yes yes"),
    ("wide", {"dynamic": {"q_proj": {"group_size": 64}}}, "no no no L yes yes yes"),
    ("wide", {"dynamic": {"q_proj": None}}, "no no no L yes yes yes"),
    ("wide", {"dynamic": {"(q|k|v)_proj": {"group_size": 64}}}, "yes yes yes L yes yes yes"),
    ("wide", {"target_bpw": 3.5, "target_widths": (2, 4)}, "no HC H L no yes yes"),
    ("wide", {"target_bpw": 5.0, "target_widths": (4, 8)}, "no yes yes L no yes yes"),
    ("gpt2", {}, "yes yes yes L yes yes yes"),
    ("gpt2", {"sym": False}, "no H H L yes yes yes"),
    ("mixtral", {}, "no yes yes L yes no yes"),
    ("qwen3_moe", {}, "no yes yes L yes yes yes"),
    ("qwen3_moe", {"bits": 3}, "no HC H L no yes yes"),
    ("qwen3_moe", COMPRESSED, "no yes yes L G G yes"),
    ("qwen3_moe", {"dynamic": {r"experts\.0\.": {"bits": 8}}}, "no no no L no yes yes"),
    ("gpt_oss", {}, "no no no L yes yes yes"),
    ("qwen3_5_moe", {}, "no yes yes L yes yes yes"),
]
REFUSED: list[tuple[str, dict[str, Any]]] = [
    ("wide", {"group_size": 1024}), ("wide", {"bits": 8, "group_size": 96}),
    ("gpt2", COMPRESSED),
]  # fmt: skip


@pytest.fixture(scope="module")
def model_of(
    folder_of: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """Folder of a small model of the table. Do not change it."""
    configs = {
        "wide": transformers.LlamaConfig(
            **{**LLAMA, "hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
        ),
        "qwen3_5_moe": transformers.Qwen3_5MoeTextConfig(
            **LLAMA, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32,
            shared_expert_intermediate_size=32, layer_types=["full_attention"] * 2,
        ),
    }  # fmt: skip
    folders = {name: tmp_path_factory.mktemp(name) for name in configs}
    for name, config in configs.items():
        model = random_model(config)
        # `save_pretrained` would write experts one by one.
        save_file(dict(model.state_dict()), folders[name] / "model.safetensors")
        model.config.save_pretrained(folders[name])
    return lambda name: folders[name] if name in folders else folder_of(name)


@pytest.fixture(autouse=True)
def _machine_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times are not looked at here, so this machine need not be measured for each row."""
    monkeypatch.setattr(cost_model, "measure_flops", lambda *_: 1e9)


def answers(folder: Path, settings: dict[str, Any]) -> Plan:
    config = rw.QuantizeConfig(**settings)
    return plan(open_for_run(folder, config, HOST, check=False), config, samples=4, seq_len=32)


@pytest.mark.parametrize(("model", "settings", "expected"), TRUTH, ids=str)
def test_which_engines_serve_the_result(
    model: str, settings: dict[str, Any], expected: str, model_of: Callable[[str], Path]
) -> None:
    group = 128 if model == "wide" else 32
    planned = answers(model_of(model), {"group_size": group, **settings})
    assert not planned.problems and len(TRUTH) >= 30
    assert_answers(planned.served_by, expected)


@pytest.mark.parametrize(("model", "settings"), REFUSED, ids=str)
def test_no_engine_serves_what_a_run_refuses(
    model: str, settings: dict[str, Any], model_of: Callable[[str], Path]
) -> None:
    planned = answers(model_of(model), {"group_size": 32, **settings})
    assert planned.problems
    assert {*planned.served_by.values()} == {"the run would be refused"}
