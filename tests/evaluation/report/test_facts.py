"""Facts of a report: layers by block and kind, outliers, gain from more text, sizes."""

import shutil

import pytest

import roundwise as rw
from roundwise.checkpoint.reader import Checkpoint
from roundwise.errors import CheckpointError
from roundwise.evaluation.report.facts import (
    Answers,
    find_outliers,
    make_cells,
    read_facts,
)
from roundwise.system.hub import bundled_model
from tests.evaluation.report.samples import KINDS, facts, layer


def test_a_finished_run(finished_run):
    out, result = finished_run
    page_facts = read_facts(out)
    assert page_facts.name == "out"
    assert page_facts.model == bundled_model().name
    assert [cell.worst.name for cell in page_facts.cells] == [
        each["name"] for each in result["layers"]
    ]
    assert page_facts.kinds == [*KINDS]
    assert page_facts.issues == result["not_as_asked"]
    tensors = Checkpoint(out).tensors
    assert sum(page_facts.sizes.values()) == sum(info.nbytes for info in tensors.values())
    qweights = [info.nbytes for name, info in tensors.items() if name.endswith(".qweight")]
    assert page_facts.sizes["codes"] == sum(qweights)
    assert page_facts.run.seconds > 0


def test_other_folders_are_refused(finished_run, tmp_path):
    with pytest.raises(CheckpointError, match=r"has no roundwise\.json: reports need a checkpoint"):
        read_facts(bundled_model())
    out, _ = finished_run
    shutil.copytree(out, tmp_path / "out")
    (tmp_path / "out" / "roundwise-run.json").write_text('{"seconds": "long"}')
    with pytest.raises(rw.RoundwiseError, match=r"run\.json is damaged: seconds"):
        read_facts(tmp_path / "out")


def test_outliers_are_found_among_layers_of_their_kind():
    layers = [
        layer(f"model.layers.{i}.{kind}", 1e-3 * (1 + k) * (1 + 0.02 * i))
        for i in range(12)
        for k, kind in enumerate(KINDS)
    ]
    assert find_outliers(make_cells(layers)) == []
    layers[40] = layer(layers[40].name, 4 * layers[40].relative_error)
    layers[3] = layer(layers[3].name, 9 * layers[3].relative_error)
    names = [each.name for each in find_outliers(make_cells(layers))]
    assert {*names} == {layers[40].name, layers[3].name}
    assert facts(layers).outlier_names == {*names}
    assert find_outliers(make_cells([layer("model.layers.0.a", None)])) == []


def test_experts_share_a_cell_that_shows_the_worst():
    names = [f"model.layers.1.mlp.experts.{i}.up_proj" for i in range(3)]
    errors = (0.1, 0.3, 0.2)
    (cell,) = make_cells([layer(n, e) for n, e in zip(names, errors, strict=True)])
    assert (cell.block, cell.kind) == ("model.layers.1", "mlp.experts.*.up_proj")
    assert (cell.error, cell.worst.name) == (0.3, names[1])


def test_layers_outside_blocks_are_cells_of_their_own():
    (cell,) = make_cells([layer("lm_head")])
    assert (cell.block, cell.kind) == ("lm_head", "lm_head")


def test_values_of_a_cell_are_listed_once():
    layers = [layer(f"h.0.experts.{i}.w1", bits=bits) for i, bits in enumerate((8, 4, 4))]
    (cell,) = make_cells(layers)
    assert cell.values("bits") == "4, 8"
    (cell,) = make_cells([layer("h.0.a", damp_percent=None), layer("h.0.a", damp_percent=0.01)])
    assert cell.values("damp_percent") == "0.01, -"


@pytest.mark.parametrize(
    ("given", "shown"),
    [("/models/tiny", "tiny"), ("./tiny", "tiny"), ("owner/tiny", "owner/tiny")],
)
def test_the_name_of_the_original(given, shown):
    assert facts([layer("h.0.a")], name=given).model == shown


def test_the_confirmed_part_is_a_median_of_layers():
    layers = [layer(f"h.{i}.a", confirmed_drift=part) for i, part in enumerate((0.2, 0.9, 0.5))]
    assert facts([*layers, layer("h.3.a")]).confirmed_drift == 0.5
    assert facts([layer("h.0.a")]).confirmed_drift is None


@pytest.mark.parametrize(
    ("original", "quantized", "common"),
    [("same", "same", 4), ("abc", "abd", 2), ("abc", "ab", 2), ("", "x", 0), ("x", "y", 0)],
)
def test_where_answers_begin_to_differ(original, quantized, common):
    assert Answers("prompt", original, quantized).common_length == common
