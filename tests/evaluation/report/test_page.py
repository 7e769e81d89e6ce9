"""The page about a run: what it says, that it is one file, and that a browser shows and sorts it."""

import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser

import pytest

import roundwise as rw
from roundwise.checkpoint.hub import bundled_model
from roundwise.evaluation.report.facts import (
    Answers,
    Evaluation,
    Facts,
    Measured,
    cells_of,
    gain,
    outliers_of,
    read_facts,
)
from roundwise.evaluation.report.page import render, write_report

KINDS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
         "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")  # fmt: skip
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


def layer(name, error=0.001, **more):
    return {
        "name": name, "bits": 4, "group_size": 128, "relative_error": error, "weight_error": 0.01,
        "damp_percent": 0.01, "damp_tried": [0.01], "tokens": 1000, "fallback": None, **more,
    }  # fmt: skip


def facts(layers, experts=(), name="a model", **more):
    """A page's facts about a run that never was."""
    cells = cells_of(layers)
    blocks = list(dict.fromkeys(cell.block for cell in cells))
    saturation = {
        "name": layers[0]["name"], "held_out_tokens": 10, "rtn": 0.1,
        "points": [{"tokens": n, "relative_error": 1 / n} for n in (10, 20, 40, 70)],
    }  # fmt: skip
    manifest = {
        "run": {
            "config": rw.QuantizeConfig().model_dump(mode="json"), "threads": 2,
            "versions": {"roundwise": "1"}, "model": {"files": {}},
            "calibration": {"source": "notes.txt", "samples": 5, "tokens": 70, "sketch": [1],
                            "distinct": 9, "unique_share": 0.5},
        },
        "mode": "true_sequential", "bits_per_weight": 4.2, "bytes_before": 10, "bytes_after": 4,
        "layers": layers, "experts": [*experts], "files": {"config.json": "abc"},
        "blocks": [
            {"name": block, "depth_error": 1e-3 * (i + 1), "saturation": None if i else saturation}
            for i, block in enumerate(blocks)
        ],
        "given": {"model": name},
    }  # fmt: skip
    run = {"seconds": 3.0, "phases": {"forward": 2.0, "solve": 1.0}, "blocks": [1.0, 2.0],
           "peak_rss_bytes": 10**9, "warnings": [], "not_as_asked": []}  # fmt: skip
    given = {"run": run, "not_as_asked": [], **more}
    return Facts(name, manifest, given.pop("run"), cells, outliers_of(cells), {"codes": 4}, **given)


class Text(HTMLParser):
    """A page's elements and text."""

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


@pytest.fixture(scope="module")
def made(tmp_path_factory, commands):
    """A 3 bit checkpoint of the bundled model and what `quantize` printed."""
    out = tmp_path_factory.mktemp("made") / "out"
    done = commands.run(
        "quantize", str(bundled_model()), str(out), "--bits", "3", "--calibration", "python-stdlib",
        "--samples", "16", "--seq-len", "64", "--batch-size", "2", "--json",
    )  # fmt: skip
    assert done.code == 0, done.stderr
    return out, done.json


def test_quantize_writes_it_with_the_figures_of_the_run(made):
    out, result = made
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
    assert page.count("<svg") == 5  # errors, depth, saturation, size, time


def test_it_is_one_file_that_asks_nobody(made):
    page = Text((made[0] / "roundwise-report.html").read_text())
    assert [link for link in page.links if not link.startswith("#")] == []
    assert not {"img", "link", "iframe", "object", "image"} & {*page.tags}
    assert len(page.ids) == len({*page.ids})
    references = {*re.findall(r"url\(#([^)]*)\)", (made[0] / "roundwise-report.html").read_text())}
    assert {*references, *(link[1:] for link in page.links)} <= {*page.ids}


def test_it_is_no_part_of_the_checkpoint(made, tmp_path, commands):
    out = tmp_path / "out"
    shutil.copytree(made[0], out)
    (out / "roundwise-report.html").unlink()
    (out / "roundwise-run.json").unlink()
    assert commands.run("verify", str(out)).code == 0
    rw.write_report(out)  # without times
    assert "peak memory" not in (out / "roundwise-report.html").read_text()


def test_equal_runs_have_equal_pages_but_for_times(made, tmp_path):
    first = write_report(made[0], tmp_path / "a.html").read_bytes()
    assert write_report(made[0], tmp_path / "b.html").read_bytes() == first


def test_the_command_measures_and_lets_both_models_write(made, commands):
    out, _ = made
    done = commands.run(
        "report", str(out), "--against", str(bundled_model()), "--text", "python-stdlib",
        "--max-tokens", "2000", "--window", "128", "--prompt", "def f(x):", "--prompt", "import ",
        "--output", str(out.parent / "full.html"), "--json",
    )  # fmt: skip
    assert done.code == 0, done.stderr
    page = (out.parent / "full.html").read_text()
    assert done.json["bytes"] == len(page.encode())
    compared = commands.run(
        "compare", str(bundled_model()), str(out), "--text", "python-stdlib", "--max-tokens", "2000",
        "--window", "128", "--no-speed", "--baseline", "rtn", "--json",
    )  # fmt: skip
    for model in compared.json["models"]:
        assert f"{model['kl_divergence']:.5f}" in page
        assert f"{model['perplexity']['quantized']:.4f}" in page
    assert page.count('<div class="two">') == 2
    assert page.count("<svg") == 6


def test_what_it_refuses(made, tmp_path, commands):
    out, _ = made
    done = commands.run("report", str(out), "--text", "python-stdlib")
    assert (done.code, "--against MODEL" in done.stderr) == (2, True)
    done = commands.run("report", str(bundled_model()))
    assert (done.code, "has no roundwise.json" in done.stderr) == (2, True)
    shutil.copytree(out, tmp_path / "out")
    (tmp_path / "out" / "roundwise-run.json").write_text('{"seconds": "long"}')
    with pytest.raises(rw.RoundwiseError, match=r"run\.json is damaged: seconds"):
        read_facts(tmp_path / "out")


def test_a_page_that_cannot_be_drawn_does_not_fail_the_run(made, monkeypatch, capsys):
    from roundwise.cli.results import write_run_report

    def fail(*_):
        raise RuntimeError("no pen")

    monkeypatch.setattr("roundwise.evaluation.report.page.render", fail)
    assert write_run_report(made[0]) is None
    assert "the report could not be written (RuntimeError: no pen)" in capsys.readouterr().err


def test_names_from_outside_stay_text():
    evil = "<script>alert(1)</script>"
    names = [f"model.layers.{i}.{kind}" for i in range(3) for kind in (evil, "$x^2$", "a]]>b&amp;")]
    measured, by = Measured(evil, 1.0, 0.1, 1.0, 1), [(0, 0.1), (9, 0.2)]
    page = render(
        facts(
            [layer(name, fallback=evil) for name in names], name=evil, not_as_asked=[evil],
            experts=[{"name": evil, "tokens": [1, 0]}], answers=[Answers(evil, evil, f"{evil}2")],
            evaluation=Evaluation(evil, [measured, replace(measured, kl_by_position=by)], evil, [evil]),
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


def test_outliers_are_named_among_their_kind():
    layers = [
        layer(f"model.layers.{i}.{kind}", 1e-3 * (1 + k) * (1 + 0.02 * i))
        for i in range(12)
        for k, kind in enumerate(KINDS)
    ]
    assert outliers_of(cells_of(layers)) == []
    layers[40]["relative_error"] *= 4
    layers[3]["relative_error"] *= 9
    found = [each["name"] for each in outliers_of(cells_of(layers))]
    assert {*found} == {layers[40]["name"], layers[3]["name"]}
    assert outliers_of(cells_of([layer("model.layers.0.a", None)])) == []


def test_experts_are_one_cell_with_the_worst_on_top():
    names = [f"model.layers.1.mlp.experts.{i}.up_proj" for i in range(3)]
    errors = (0.1, 0.3, 0.2)
    (cell,) = cells_of([layer(n, e) for n, e in zip(names, errors, strict=True)])
    assert (cell.block, cell.kind) == ("model.layers.1", "mlp.experts.*.up_proj")
    assert (cell.error, cell.worst["name"]) == (0.3, names[1])


def test_gain_is_that_of_a_doubling():
    half = [{"tokens": n, "relative_error": 1 / n} for n in (100, 175)]
    assert gain(half) == pytest.approx(0.5)
    assert gain([{"tokens": n, "relative_error": 2.0} for n in (100, 175)]) == 0.0
    assert gain(half[:1]) is None


def browse(page, *options):
    """What Chromium makes of a page: its standard output."""
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
def test_a_browser_sorts_its_tables(made, tmp_path):
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
    page.write_text((made[0] / "roundwise-report.html").read_text().replace("</body>", click))
    dom, complaints = browse(page, "--dump-dom", "--enable-logging=stderr")
    errors = sorted(each["relative_error"] for each in made[1]["layers"])
    title, down = (
        [float(value) for value in re.search(pattern, dom)[1].split(",")]
        for pattern in ("<title>(.*?)</title>", 'data-down="(.*?)"')
    )
    assert title == pytest.approx(errors)
    assert down == pytest.approx(errors[::-1])
    assert "CONSOLE" not in complaints  # nothing was refused, nothing failed


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
@pytest.mark.parametrize(("dark", "ground"), [(False, (255, 255, 255)), (True, (20, 23, 28))])
def test_a_browser_draws_it_in_light_and_dark(made, tmp_path, dark, ground):
    from PIL import Image

    page = tmp_path / "page.html"
    shutil.copy(made[0] / "roundwise-report.html", page)
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
        facts([{**each, "bits": 4} for each in layers])
    )


def test_what_is_not_known_is_said():
    known = facts([layer("model.layers.0.mlp.up_proj")])
    unknown = replace(known, manifest={
        **known.manifest, "blocks": [{**b, "depth_error": None} for b in known.manifest["blocks"]],
    })  # fmt: skip
    sentence = "Not known: with alpha and beta 0 the original is not played"
    assert sentence not in render(known)
    assert sentence in render(unknown)
    rounded = facts([layer("model.layers.0.mlp.up_proj", None)])
    assert "rounding to nearest sees no inputs" in render(rounded)
