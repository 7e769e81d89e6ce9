"""The report page: its contents, that it is a single file, and that a browser draws and sorts it."""

import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser

import pytest

import roundwise as rw
from roundwise.checkpoint.manifest import Manifest
from roundwise.evaluation.report.facts import Answers, Evaluation, ModelMetrics
from roundwise.evaluation.report.page import render, write_report
from tests.evaluation.report.samples import KINDS, facts, layer

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


class Text(HTMLParser):
    """Elements and text of a page."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.links, self.ids, self.text = [], [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.ids += [value for name, value in attributes if name == "id"]
        self.links += [value for name, value in attributes if name in ("src", "href", "xlink:href")]

    def handle_data(self, data):
        self.text.append(data)


def test_quantize_writes_it_with_the_figures_of_the_run(finished_run):
    out, result = finished_run
    assert result["report"] == str(out / "roundwise-report.html")
    page = (out / "roundwise-report.html").read_text()
    text = " ".join("".join(Text(page).text).split())
    worst = max(result["layers"], key=lambda each: each["relative_error"])
    assert f"{worst['relative_error']:.2e}" in text
    assert f"{result['bits_per_weight']:.2f}" in text
    for each in result["layers"]:
        assert each["name"] in text
    assert "1,024 tokens in 16 windows" in text
    assert "16 calibration samples: 128 or more are advised" in text
    assert page.count("<svg") == 4  # errors, depth, size, time


def test_it_loads_nothing_from_elsewhere(finished_run):
    page = Text((finished_run[0] / "roundwise-report.html").read_text())
    assert [link for link in page.links if not link.startswith("#")] == []
    assert not {"img", "link", "iframe", "object", "image"} & {*page.tags}
    assert len(page.ids) == len({*page.ids})
    references = {
        *re.findall(r"url\(#([^)]*)\)", (finished_run[0] / "roundwise-report.html").read_text())
    }
    assert {*references, *(link[1:] for link in page.links)} <= {*page.ids}


def test_it_is_not_a_part_of_the_checkpoint(finished_run, tmp_path, commands):
    out = tmp_path / "out"
    shutil.copytree(finished_run[0], out)
    (out / "roundwise-report.html").unlink()
    (out / "roundwise-run.json").unlink()
    assert commands.run("verify", str(out)).code == 0
    rw.write_report(out)  # without times
    assert "peak memory" not in (out / "roundwise-report.html").read_text()


def test_equal_runs_have_equal_pages_but_for_times(finished_run, tmp_path):
    first = write_report(finished_run[0], tmp_path / "a.html").read_bytes()
    assert write_report(finished_run[0], tmp_path / "b.html").read_bytes() == first


def test_a_report_that_fails_does_not_fail_the_run(finished_run, monkeypatch, capsys):
    from roundwise.cli.results import write_run_report

    def fail(*_):
        raise RuntimeError("no pen")

    monkeypatch.setattr("roundwise.evaluation.report.page.render", fail)
    assert write_run_report(finished_run[0]) is None
    assert "the report could not be written (RuntimeError: no pen)" in capsys.readouterr().err


def test_foreign_names_are_escaped():
    evil = "<script>alert(1)</script>"
    names = [f"model.layers.{i}.{kind}" for i in range(3) for kind in (evil, "$x^2$", "a]]>b&amp;")]
    metrics = ModelMetrics(evil, 1.0, 0.1, 1.0, 1)
    charted = replace(metrics, kl_by_position=[(0, 0.1), (9, 0.2)])
    page = render(
        facts(
            [layer(name, fallback=evil) for name in names], name=evil, issues=[evil],
            experts=[{"name": evil, "tokens": [1, 0]}], answers=[Answers(evil, evil, f"{evil}2")],
            evaluation=Evaluation(evil, [metrics, charted], evil, [evil]),
        )
    )  # fmt: skip
    assert "alert(1)</script>" not in page
    assert "alert(1)" in "".join(Text(page).text)
    assert Text(page).tags.count("script") == 1
    assert "$x^2$" in "".join(Text(page).text)


@pytest.mark.parametrize("experts", [0, 128])
def test_80_blocks_stay_below_2_mb(experts):
    kinds = KINDS
    if experts:
        moe = [f"mlp.experts.{i}.{p}_proj" for i in range(experts) for p in ("gate", "up", "down")]
        kinds = (*KINDS[:4], *moe)
    layers = [
        layer(f"model.layers.{i}.{kind}", 1e-3 * (1 + (i * len(kind)) % 7))
        for i in range(80)
        for kind in kinds
    ]
    routers = [{"name": f"model.layers.{i}.mlp", "tokens": [7] * experts} for i in range(80)]
    page = render(facts(layers, routers if experts else []))
    assert len(page.encode()) < 2_000_000
    assert page.count("<tr") == page.count("</tr>") > 80 * 7


def browse(page, *options):
    """Opens a page in Chromium; returns its standard output and standard error."""
    assert CHROMIUM is not None
    done = subprocess.run(
        [
            CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync",
            f"--user-data-dir={page.parent / 'profile'}", "--window-size=1000,1200", *options,
            page.as_uri(),
        ],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_a_browser_sorts_its_tables(finished_run, tmp_path):
    click = """<script>
      const head = document.querySelectorAll("#layers th")[3];
      const errors = () => [...document.querySelectorAll("#layers tbody tr")].map(
        row => row.cells[3].dataset.value).join();
      head.click();
      document.title = errors();
      head.click();
      document.body.dataset.down = errors();
    </script></body>"""
    page = tmp_path / "page.html"
    page.write_text(
        (finished_run[0] / "roundwise-report.html").read_text().replace("</body>", click)
    )
    dom, complaints = browse(page, "--dump-dom", "--enable-logging=stderr")
    errors = sorted(each["relative_error"] for each in finished_run[1]["layers"])
    title, down = (
        [float(value) for value in re.search(pattern, dom)[1].split(",")]
        for pattern in ("<title>(.*?)</title>", 'data-down="(.*?)"')
    )
    assert title == pytest.approx(errors)
    assert down == pytest.approx(errors[::-1])
    assert "CONSOLE" not in complaints  # nothing was refused, nothing failed


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
@pytest.mark.parametrize(("dark", "ground"), [(False, (255, 255, 255)), (True, (20, 23, 28))])
def test_a_browser_draws_it_in_light_and_dark(finished_run, tmp_path, dark, ground):
    from PIL import Image

    page = tmp_path / "page.html"
    shutil.copy(finished_run[0] / "roundwise-report.html", page)
    scheme = ["--blink-settings=preferredColorScheme=0"] if dark else []
    browse(page, f"--screenshot={tmp_path / 'page.png'}", "--hide-scrollbars", *scheme)
    with Image.open(tmp_path / "page.png") as picture:
        colors = picture.convert("RGB").getcolors(1 << 24)
    counts = {color: count for count, color in colors}
    assert max(counts, key=counts.__getitem__) == ground
    assert any(
        b > r + 40 for (r, _, b), count in counts.items() if count > 500
    )  # the heat map's blue


def test_widths_that_differ_are_listed():
    layers = [layer(f"model.layers.{i}.mlp.up_proj", bits=8 if i < 2 else 4) for i in range(5)]
    assert "8/128 x2, 4/128 x3" in render(facts(layers))
    assert "5 layers of 4 bits, groups of 128" in render(
        facts([layer(each.name) for each in layers])
    )


def test_missing_values_are_explained():
    known = facts([layer("model.layers.0.mlp.up_proj")])
    changed = known.manifest.as_json()
    for block in changed["blocks"]:
        block["depth_error"] = None
    unknown = replace(known, manifest=Manifest.model_validate(changed))
    sentence = "Not available: with alpha and beta 0 the original model does not run."
    assert sentence not in render(known)
    assert sentence in render(unknown)
    rounded = facts([layer("model.layers.0.mlp.up_proj", None)])
    assert "rounding to nearest uses no calibration inputs" in render(rounded)


def test_options_to_copy_for_layers_that_lose_much():
    layers = [
        layer(f"model.layers.{i}.{kind}", 1e-3 * (1 + 0.02 * i) * (20 if i == 0 else 1))
        for i in range(12)
        for kind in KINDS
    ]
    page = render(facts(layers))
    found = facts(layers)
    [option] = {each.option for each in found.sensitive if each.is_notable}
    text = "".join(Text(page).text)
    assert option in text
    assert found.outlier_override in text
    assert "The first block of 12: 2.00e-02 on average" in text
    assert "Query and key projections" in text
    assert "Nothing needs to be done about them." in text
    assert "REGEX" not in text


def test_names_of_layers_break_behind_dots_only():
    page = render(facts([layer("model.layers.0.mlp.up_proj")]))
    assert '<td class="name">model.layers.0.mlp.up_proj</td>' in page
    assert "<span>model.<wbr>layers.<wbr>0.<wbr>mlp.<wbr>up_proj</span>" in page
