"""Options to copy for layers that lose much: their patterns match these layers and no others."""

from __future__ import annotations

import re
import shlex

import pytest

import roundwise as rw
from roundwise.cli.options import parse_dynamic
from roundwise.evaluation.report.advice import override, sensitive_layers
from tests.evaluation.report.samples import KINDS, facts, layer

LAYERS = [layer(f"model.layers.{i}.{kind}") for i in range(32) for kind in KINDS]
BLOCKS = [f"model.layers.{i}" for i in range(32)]


def changed_by(option: str | None, names: list[str]) -> set[str]:
    """The layers that an option of the command line gives 8 bits."""
    assert option is not None
    flag, value = shlex.split(option)
    assert flag == "--override"
    config = rw.QuantizeConfig(dynamic=parse_dynamic([value], []))
    settings = {name: config.for_module(name) for name in names}
    return {name for name, each in settings.items() if each is not None and each.bits == 8}


@pytest.mark.parametrize(
    "chosen",
    [
        {"model.layers.1.mlp.down_proj"},
        {"model.layers.1.mlp.down_proj", "model.layers.11.mlp.down_proj"},
        {"model.layers.3.self_attn.o_proj", "model.layers.4.mlp.down_proj"},
        {each.name for each in LAYERS if ".layers.0." in each.name or ".layers.1." in each.name},
        {each.name for each in LAYERS if each.name.endswith(("down_proj", "o_proj"))},
    ],
)
def test_a_pattern_matches_its_layers_and_no_others(chosen: set[str]) -> None:
    names = [each.name for each in LAYERS]
    option = override([each for each in LAYERS if each.name in chosen], LAYERS)
    assert changed_by(option, [*names, *(f"draft.{name}" for name in names), "lm_head"]) == chosen


def test_layers_that_engines_fuse_come_along() -> None:
    names = [each.name for each in LAYERS]
    option = override([LAYERS[8]], LAYERS)  # k_proj of block 1
    parent = "model.layers.1.self_attn"
    assert changed_by(option, names) == {f"{parent}.{kind}_proj" for kind in "qkv"}
    gate = override([LAYERS[4]], LAYERS)
    assert changed_by(gate, names) == {f"model.layers.0.mlp.{kind}_proj" for kind in ("gate", "up")}


def test_names_with_two_numbers_and_none() -> None:
    layers = [
        layer("lm_head"),
        *(layer(f"h.{i}.experts.{j}.w1") for i in (0, 1) for j in (0, 1, 2)),
    ]
    names = [each.name for each in layers]
    chosen = {"lm_head", "h.0.experts.2.w1"}
    option = override([each for each in layers if each.name in chosen], layers)
    assert changed_by(option, names) == chosen


def test_layers_that_have_8_bits_need_nothing() -> None:
    layers = [layer("h.0.a.q_proj", bits=8), layer("h.0.a.k_proj", bits=8)]
    assert override(layers, layers) is None
    assert override([], layers) is None


def test_the_first_blocks_and_query_and_key() -> None:
    errors = {"q_proj": 0.004, "k_proj": 0.016}
    layers = []
    for each in LAYERS:
        block, kind = int(each.name.split(".")[2]), each.name.rpartition(".")[2]
        layers.append(layer(each.name, errors.get(kind, 0.001) * (3 if block < 2 else 1)))
    first, attention = sensitive_layers(layers, BLOCKS)
    assert (first.title, first.count) == ("the first 2 blocks of 32", 14)
    assert first.ratio == pytest.approx(3)
    assert first.is_notable
    names = [each.name for each in layers]
    assert changed_by(first.option, names) == {
        name for name in names if re.match(r"model\.layers\.[01]\.", name)
    }
    assert (attention.title, attention.count) == ("query and key projections", 64)
    assert attention.ratio == pytest.approx(8)
    assert {name.rpartition(".")[2] for name in changed_by(attention.option, names)} == {
        "q_proj", "k_proj", "v_proj",
    }  # fmt: skip


def test_nothing_is_said_without_errors_or_others() -> None:
    assert sensitive_layers([layer("h.0.a", None), layer("h.1.a", None)], ["h.0", "h.1"]) == []
    assert sensitive_layers([layer("h.0.a")], ["h.0"]) == []
    [first] = facts([layer("h.0.a"), layer("h.1.a")]).sensitive
    assert (first.title, first.ratio, first.is_notable) == ("the first block of 2", 1, False)
