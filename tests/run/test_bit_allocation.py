"""`--target-bpw`: widths are chosen well, once, and within the size; the result beats one width."""

from __future__ import annotations

import itertools
import json
import random
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import roundwise as rw
from roundwise.calibration.sources import read_text
from roundwise.errors import ConfigError, OutputError
from roundwise.evaluation.divergence import divergence
from roundwise.run import bit_allocation
from roundwise.run.bit_allocation import (
    Candidate,
    LayerGroup,
    as_dynamic,
    choose_candidates,
)
from tests.helpers import Stop, contents, random_model, stop_after
from tests.helpers import windows as random_windows
from tests.mixtures import MIXTURES

OPTIONS: dict[str, Any] = {"samples": 8, "seq_len": 64, "batch_size": 4}


def layer_groups(seed: int, count: int = 4) -> list[LayerGroup]:
    """Groups whose losses fall to about a quarter with each bit, as measured ones do."""
    generator = random.Random(seed)
    groups = []
    for index in range(count):
        weights = generator.choice([1024, 4096, 16384])
        worst = generator.uniform(0.1, 10)
        candidates = [
            Candidate(
                bits, 128, weights * bits // 8, worst * 0.25**bits * generator.uniform(0.8, 1.2)
            )
            for bits in (2, 3, 4, 8)
        ]
        groups.append(LayerGroup((f"layer.{index}",), weights, tuple(candidates)))
    return groups


@pytest.mark.parametrize("target", [2.0, 2.5, 3.3, 4.0, 6.0, 8.0])
@pytest.mark.parametrize("seed", range(10))
def test_the_choice_is_near_the_best(seed: int, target: float) -> None:
    groups = layer_groups(seed)
    budget = target * sum(group.weights for group in groups) / 8
    chosen = choose_candidates(groups, target)
    assert sum(candidate.nbytes for candidate in chosen) <= budget
    allowed = [
        sum(candidate.loss for candidate in combination)
        for combination in itertools.product(*(group.candidates for group in groups))
        if sum(candidate.nbytes for candidate in combination) <= budget
    ]
    # Greedy by loss per byte: what is left at the end may be too little for any other candidate.
    largest = max(group.candidates[0].loss for group in groups)
    assert sum(candidate.loss for candidate in chosen) <= min(allowed) + 0.3 * largest


def test_a_size_that_cannot_be_reached() -> None:
    with pytest.raises(ConfigError, match=r"target_bpw=1.5 is too small: .* need 2.00 bits"):
        choose_candidates(layer_groups(0), 1.5)


def rules(layers: dict[tuple[str, ...], tuple[int, int]]) -> rw.QuantizeConfig:
    """Settings with a rule for each group of layers: names -> (bits, group_size)."""
    groups = [LayerGroup(names, 1, ()) for names in layers]
    return rw.QuantizeConfig(
        dynamic=as_dynamic(groups, [Candidate(*width, 0, 0.0) for width in layers.values()])
    )


def test_fused_layers_are_found_by_their_fused_name() -> None:
    attention = "model.layers.0.self_attn"
    config = rules({tuple(f"{attention}.{name}_proj" for name in "qkv"): (8, 32)})
    assert config.for_module(f"{attention}.qkv_proj").bits == 8
    assert config.for_module(f"{attention}.o_proj").bits == 4  # the default


def test_layers_with_equal_settings_share_a_pattern() -> None:
    config = rules({("a.q", "a.k"): (4, 128), ("a.o",): (3, 32), ("b.q", "b.k"): (4, 128)})
    assert len(config.dynamic) == 2
    assert config.for_module("a.o").bits == 3
    assert config.for_module("b.k").group_size == 128


@pytest.mark.sampled(2)
@pytest.mark.parametrize("target", [3.3, 4.5])
def test_the_size_is_not_exceeded_and_fused_layers_agree(
    target: float, tiny: Path, tmp_path: Path
) -> None:
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


def test_overrides_of_the_user_are_kept(tiny: Path, tmp_path: Path) -> None:
    dynamic = {r"layers\.0\.": None, "down_proj": {"bits": 8}}
    config = rw.QuantizeConfig(target_bpw=3.3, recipe="textbook", dynamic=dynamic)
    result = rw.quantize(tiny, tmp_path, config, "python-stdlib", **OPTIONS)
    assert not any(".layers.0." in layer["name"] for layer in result.layers)
    assert {x["bits"] for x in result.layers if "down_proj" in x["name"]} == {8}


@pytest.mark.slow
def test_widths_are_chosen_once(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = rw.QuantizeConfig(target_bpw=3.5, recipe="textbook")
    rw.quantize(tiny, tmp_path / "whole", config, "python-stdlib", **OPTIONS)
    with pytest.raises(Stop):
        rw.quantize(
            tiny, tmp_path / "parts", config, "python-stdlib", **OPTIONS, progress=stop_after(20)
        )
    measured = []
    measure_sensitivity = bit_allocation.measure_sensitivity
    monkeypatch.setattr(
        bit_allocation,
        "measure_sensitivity",
        lambda *a: measured.append(a) or measure_sensitivity(*a),
    )
    rw.quantize(tiny, tmp_path / "parts", config, "python-stdlib", **OPTIONS)
    rw.quantize(tiny, tmp_path / "whole", config, "python-stdlib", **OPTIONS)
    assert not measured
    assert contents(tmp_path / "whole") == contents(tmp_path / "parts")
    rw.quantize(
        tiny, tmp_path / "whole", config, "python-stdlib", **{**OPTIONS, "seed": 1}, restart=True
    )
    assert len(measured) == 1  # another text: measured again


def test_a_restart_does_not_look_at_an_earlier_run(llama: Path, tmp_path: Path) -> None:
    config = rw.QuantizeConfig(target_bpw=5.0, group_size=32, recipe="textbook")
    journal = tmp_path / "out" / ".roundwise" / "journal.jsonl"
    journal.parent.mkdir(parents=True)
    journal.write_text('{"fingerprint": {}}\n')  # of an earlier version
    run = partial(
        rw.quantize, llama, tmp_path / "out", config, random_windows(), samples=4, seq_len=32
    )
    with pytest.raises(OutputError, match=r"another version of roundwise: .*--restart"):
        run()
    assert len(run(restart=True).layers) == 14


def test_the_command_and_its_repetition_from_the_manifest(
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
    widths: dict[str, set[tuple[int, int]]] = {}
    for layer in result.layers:
        if ".experts." in layer["name"]:
            block = layer["name"].split(".experts.")[0]
            widths.setdefault(block, set()).add((layer["bits"], layer["group_size"]))
    assert widths
    assert all(len(each) == 1 for each in widths.values())
    rw.load(tmp_path / "out")


@pytest.mark.slow
def test_better_than_one_width_at_the_same_size(tiny: Path, tmp_path: Path) -> None:
    base, tokenizer = rw.load(tiny, dtype=torch.float32)
    ids = tokenizer(read_text("python-stdlib")[:40_000], verbose=False)["input_ids"][:8192]
    results = {}
    size = None
    for name in ("uniform", "chosen"):
        config = rw.QuantizeConfig(bits=3, recipe="textbook", target_bpw=size)
        result = rw.quantize(
            tiny, tmp_path / name, config, "python-stdlib", samples=32, seq_len=256, batch_size=8
        )
        size = result.bits_per_weight if size is None else size
        assert result.bits_per_weight <= size
        results[name] = divergence(base, rw.load(tmp_path / name, dtype=torch.float32)[0], ids)
    assert results["chosen"].kl_divergence < results["uniform"].kl_divergence
