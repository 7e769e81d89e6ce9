"""Charts: which are drawn, in the colours of the page, with the values of the facts."""

import re
from dataclasses import replace
from xml.etree import ElementTree

import pytest

from roundwise.checkpoint.manifest import Manifest
from roundwise.evaluation.report.charts import COLORS, charts
from roundwise.evaluation.report.facts import Evaluation, ModelMetrics
from tests.evaluation.report.samples import KINDS, facts, layer

LAYERS = [layer(f"model.layers.{i}.{kind}", 1e-3 * (i + 1)) for i in range(3) for kind in KINDS]


def texts(svg):
    """All text of an SVG."""
    return [element.text for element in ElementTree.fromstring(svg).iter() if element.text]


@pytest.fixture(scope="module")
def drawn():
    metrics = ModelMetrics("4 bit", 10.0, 0.1, 0.9, 4, [(0, 0.1), (64, 0.3)])
    original = ModelMetrics("original", 9.0, 0.0, 1.0, 10)
    evaluation = Evaluation("a text", [original, metrics], "safe")
    return charts(facts(LAYERS, evaluation=evaluation))


def test_all_charts_with_data_are_drawn(drawn):
    assert drawn.keys() == {"errors", "depth", "sizes", "position", "phases"}


def test_charts_without_data_are_left_out():
    sample = facts([layer("model.layers.0.a", None)])
    changed = sample.manifest.as_json()
    changed["blocks"] = [{"name": "model.layers.0", "depth_error": None}]
    unknown = replace(sample, manifest=Manifest.model_validate(changed), run=None)
    assert charts(unknown).keys() == {"sizes"}


def test_they_are_elements_for_a_page(drawn):
    ids = []
    for name, svg in drawn.items():
        root = ElementTree.fromstring(svg)
        assert svg.startswith("<svg role=")
        assert root.attrib["role"] == "img"
        assert root.attrib["aria-label"]
        own = [element.attrib["id"] for element in root.iter() if "id" in element.attrib]
        prefix = {"sizes": "MB", "phases": "seconds"}.get(name, name)
        assert all(each.startswith(f"{prefix}-") for each in own)
        ids += own
    assert len(ids) == len({*ids})


def test_they_use_the_colours_of_the_page(drawn):
    for svg in drawn.values():
        assert not re.search("|".join(COLORS), svg, re.IGNORECASE)
        assert "currentColor" in svg
    assert "var(--blue)" in drawn["phases"]


def test_labels(drawn):
    kinds = texts(drawn["errors"])
    assert {*KINDS} <= {*kinds}
    assert "relative output error" in kinds
    assert "4 bit" in texts(drawn["position"])
    assert "original" not in texts(drawn["position"])
    assert {"forward", "solve", "seconds", "2.0", "1.0"} <= {*texts(drawn["phases"])}


def test_outliers_are_ringed():
    rings = [svg.count("<use") for svg in (
        charts(facts(LAYERS))["errors"],
        charts(facts(LAYERS, outliers=[LAYERS[0], LAYERS[8]]))["errors"],
    )]  # fmt: skip
    assert rings[1] - rings[0] == 4  # a white ring on a black one for each


def test_long_names_are_shortened_at_the_start():
    name = "model.layers.0." + "a" * 60 + ".end"
    labels = [text for text in texts(charts(facts([layer(name)]))["errors"]) if "aaa" in text]
    assert len(labels) == 1
    assert len(labels[0]) == 44
    assert labels[0].startswith("…")
    assert labels[0].endswith(".end")


def test_equal_facts_have_equal_charts():
    assert charts(facts(LAYERS)) == charts(facts(LAYERS))
