"""`--target-bpw`: the choice is the best there is, made once, kept within the size, and worth it."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

import roundwise as rw
from roundwise.calibration.sources import read_text
from roundwise.checkpoint.engines import with_packed_names
from roundwise.errors import ConfigError
from roundwise.evaluation.divergence import divergence
from roundwise.run import bit_allocation
from roundwise.run.bit_allocation import (
    Candidate,
    Choice,
    LayerGroup,
    as_dynamic,
    choose_candidates,
)
from tests.helpers import Stop, contents, random_model, stop_after
from tests.helpers import windows as random_windows
from tests.mixtures import MIXTURES

OPTIONS: dict[str, Any] = {"samples": 8, "seq_len": 64, "batch_size": 4}


def units(seed: int, count: int = 4) -> list[LayerGroup]:
    """Losses that fall with size, as those of widths do: a quarter or so for each bit."""
    generator = random.Random(seed)
    found = []
    for index in range(count):
        weights = generator.choice([1024, 4096, 16384])
        worst = generator.uniform(0.1, 10)
        options = [
            Candidate(
                bits, 128, weights * bits // 8, worst * 0.25**bits * generator.uniform(0.8, 1.2)
            )
            for bits in (2, 3, 4, 8)
        ]
        found.append(LayerGroup((f"layer.{index}",), weights, tuple(options)))
    return found


@pytest.mark.parametrize("target", [2.0, 2.5, 3.3, 4.0, 6.0, 8.0])
@pytest.mark.parametrize("seed", range(10))
def test_the_choice_is_near_the_best(seed: int, target: float) -> None:
    each = units(seed)
    weights = sum(unit.weights for unit in each)
    chosen = choose_candidates(each, target)
    by_name = {name: (c.bits, c.loss) for c in chosen for name in c.names}
    spent = sum(unit.weights * by_name[unit.names[0]][0] for unit in each) / weights
    assert spent <= target
    allowed = [
        sum(option.loss for option in some)
        for some in itertools.product(*(unit.options for unit in each))
        if 8 * sum(option.nbytes for option in some) <= target * weights
    ]
    # Greedy by loss per byte: what is left of the size at the end may be less than a unit takes.
    largest = max(unit.options[0].loss for unit in each)
    assert sum(c.loss for c in chosen) <= min(allowed) + 0.3 * largest


def test_engines_that_join_layers_find_them() -> None:
    names = ("model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj")
    assert with_packed_names(names) == [*names]
    join_process_group = with_packed_names(
        [*names, "model.layers.0.self_attn.v_proj", "model.layers.0.mlp.up_proj"]
    )
    assert join_process_group[4:] == ["model.layers.0.self_attn.qkv_proj"]
    config = rw.QuantizeConfig(
        dynamic=as_dynamic([Choice(tuple(join_process_group[:3]), 8, 32, 0.0)])
    )
    assert config.for_module("model.layers.0.self_attn.qkv_proj").bits == 8


def test_a_size_that_cannot_be_reached() -> None:
    with pytest.raises(ConfigError, match=r"target_bpw=1.5 cannot be reached: .* take 2.00 bits"):
        choose_candidates(units(0), 1.5)


def test_layers_alike_share_a_pattern() -> None:
    chosen = [
        Choice(("a.q", "a.k"), 4, 128, 0.0),
        Choice(("a.o",), 3, 32, 0.0),
        Choice(("b.q", "b.k"), 4, 128, 0.0),
    ]
    config = rw.QuantizeConfig(dynamic=as_dynamic(chosen))
    assert len(config.dynamic) == 2
    assert config.for_module("a.o").bits == 3
    assert config.for_module("b.k").group_size == 128


@pytest.mark.parametrize("target", [3.3, 4.5])
def test_the_size_is_kept_and_fused_layers_agree(target: float, tiny: Path, tmp_path: Path) -> None:
    config = rw.QuantizeConfig(target_bpw=target, recipe="textbook")
    result = rw.quantize(tiny, tmp_path, config, "python-stdlib", **OPTIONS)
    assert target - 0.2 < result.bits_per_weight <= target
    layers = {layer["name"]: (layer["bits"], layer["group_size"]) for layer in result.layers}
    assert len(set(layers.values())) > 1
    for block in range(6):
        qkv = {layers[f"model.layers.{block}.self_attn.{p}_proj"] for p in "qkv"}
        gate_up = {layers[f"model.layers.{block}.mlp.{p}_proj"] for p in ("gate", "up")}
        assert len(qkv) == len(gate_up) == 1
    rw.load(tmp_path)


def test_what_the_user_settles_stays(tiny: Path, tmp_path: Path) -> None:
    dynamic = {r"layers\.0\.": None, "down_proj": {"bits": 8}}
    config = rw.QuantizeConfig(target_bpw=3.3, recipe="textbook", dynamic=dynamic)
    result = rw.quantize(tiny, tmp_path, config, "python-stdlib", **OPTIONS)
    assert not any(".layers.0." in layer["name"] for layer in result.layers)
    assert {x["bits"] for x in result.layers if "down_proj" in x["name"]} == {8}


def test_chosen_once(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = rw.QuantizeConfig(target_bpw=3.5, recipe="textbook")
    rw.quantize(tiny, tmp_path / "whole", config, "python-stdlib", **OPTIONS)
    with pytest.raises(Stop):
        rw.quantize(
            tiny, tmp_path / "parts", config, "python-stdlib", **OPTIONS, progress=stop_after(20)
        )
    asked = []
    measure_sensitivity = bit_allocation.measure_sensitivity
    monkeypatch.setattr(
        bit_allocation, "measure_sensitivity", lambda *a: asked.append(a) or measure_sensitivity(*a)
    )
    rw.quantize(tiny, tmp_path / "parts", config, "python-stdlib", **OPTIONS)
    rw.quantize(tiny, tmp_path / "whole", config, "python-stdlib", **OPTIONS)
    assert not asked
    assert contents(tmp_path / "whole") == contents(tmp_path / "parts")
    rw.quantize(
        tiny, tmp_path / "whole", config, "python-stdlib", **{**OPTIONS, "seed": 1}, restart=True
    )
    assert len(asked) == 1  # another text is another question


def test_as_a_command_and_again_from_the_manifest(
    tiny: Path, tmp_path: Path, commands: Any
) -> None:
    made = commands.run(
        "quantize", tiny, tmp_path / "out", "--calibration", "python-stdlib", "--target-bpw", 3.5,
        "--samples", 8, "--seq-len", 64, "--recipe", "textbook", "--target-widths", "3,4",
    )  # fmt: skip
    assert made.code == 0, made.stderr
    assert "model.layers.*.self_attn.q_proj: " in made.stdout
    manifest = json.loads((tmp_path / "out" / "roundwise.json").read_text())
    assert {layer["bits"] for layer in manifest["layers"]} == {3, 4}
    again = commands.run(
        "quantize", "--from-manifest", tmp_path / "out", "--output", tmp_path / "again", "--json"
    )
    assert again.code == 0, again.stderr
    assert again.json["same"] is True
    refused = commands.run(
        "quantize", tiny, tmp_path / "rtn", "--method", "rtn", "--target-bpw", 3.5
    )
    assert refused.code == 2
    assert "rtn does not" in refused.sentence


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_all_experts_of_a_layer_agree(name: str, tmp_path: Path) -> None:
    random_model(MIXTURES[name].config()).save_pretrained(tmp_path / "model")
    config = rw.QuantizeConfig(target_bpw=5.0, group_size=32, recipe="textbook", expert_tokens=4)
    result = rw.quantize(
        tmp_path / "model", tmp_path / "out", config, random_windows(),
        samples=4, seq_len=32, batch_size=2,
    )  # fmt: skip
    found: dict[str, set[tuple[int, int]]] = {}
    for layer in result.layers:
        if ".experts." in layer["name"]:
            block = layer["name"].split(".experts.")[0]
            found.setdefault(block, set()).add((layer["bits"], layer["group_size"]))
    assert found
    assert all(len(each) == 1 for each in found.values())
    rw.load(tmp_path / "out")


def test_better_than_one_width_at_the_same_size(tiny: Path, tmp_path: Path) -> None:
    base, tokenizer = rw.load(tiny, dtype=torch.float32)
    ids = tokenizer(read_text("python-stdlib")[:40_000], verbose=False)["input_ids"][:8192]
    found = {}
    size = None
    for name in ("uniform", "chosen"):
        config = rw.QuantizeConfig(bits=3, recipe="textbook", target_bpw=size)
        result = rw.quantize(
            tiny, tmp_path / name, config, "python-stdlib", samples=32, seq_len=256, batch_size=8
        )
        size = result.bits_per_weight if size is None else size
        assert result.bits_per_weight <= size
        found[name] = divergence(base, rw.load(tmp_path / name, dtype=torch.float32)[0], ids)
    assert found["chosen"].kl_divergence < found["uniform"].kl_divergence
