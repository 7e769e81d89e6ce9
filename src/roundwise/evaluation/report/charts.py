"""Draws the charts of a report as SVG that is part of the page and uses its colours, light or dark.

Charts are drawn by matplotlib. Lines differ in markers and dashes as well as in colour (the palette of
Okabe and Ito), and the colours of the heat map (cividis) get steadily lighter: both are readable with
colour blindness.
"""

from __future__ import annotations

import io
import re
from itertools import cycle
from typing import Any

from roundwise.evaluation.report.facts import Facts

#: Colours in matplotlib's SVG that are placeholders for colours of the page.
INK, FAINT = "#010203", "#040506"
#: Colour in matplotlib's SVG -> CSS colour of the page.
COLORS = {
    INK: "currentColor", FAINT: "var(--faint)",
    "#0072b2": "var(--blue)", "#d55e00": "var(--red)", "#009e73": "var(--green)",
    "#e69f00": "var(--yellow)", "#cc79a7": "var(--pink)",
}  # fmt: skip
#: Colour, marker and dashes of each line.
LINES = list(zip(list(COLORS)[2:], "osD^v", ("-", "--", "-.", ":", "-"), strict=True))
STYLE = {
    "svg.fonttype": "none", "svg.hashsalt": "roundwise", "text.parse_math": False,
    "font.family": "sans-serif", "font.size": 10, "text.color": INK, "axes.labelcolor": INK,
    "axes.edgecolor": FAINT, "xtick.color": INK, "ytick.color": INK, "grid.color": FAINT,
    "grid.linewidth": 0.6, "axes.spines.top": False, "axes.spines.right": False,
    "legend.frameon": False, "axes.grid": True, "axes.axisbelow": True,
}  # fmt: skip
#: Namespace of the attribute by which matplotlib's SVG refers to its own shapes.
XLINK = 'xmlns:xlink="http://www.w3.org/1999/xlink"'
#: Most characters of a name beside an axis.
MAX_LABEL = 44


def charts(facts: Facts) -> dict[str, str]:
    """Draws every chart that has data.

    Returns:
        Name of the chart -> SVG. Names: errors, depth, sizes, position, phases.
    """
    import matplotlib as mpl

    with mpl.rc_context(STYLE):  # type: ignore[arg-type]
        svgs = {
            "errors": _layer_errors(facts),
            "depth": _depth_errors(facts),
            "sizes": _bars(facts.sizes, 1e6, "MB"),
            "position": _kl_by_position(facts),
        }
        if facts.run is not None:
            phases = dict(sorted(facts.run.phases.items(), key=lambda item: -item[1]))
            svgs["phases"] = _bars(phases, 1, "seconds")
    return {name: svg for name, svg in svgs.items() if svg is not None}


def _layer_errors(facts: Facts) -> str | None:
    """Heat map: relative output error by block (x axis) and kind of layer (y axis)."""
    import numpy as np
    from matplotlib import colormaps
    from matplotlib.colors import LogNorm

    errors = [cell.error for cell in facts.cells if cell.error]
    if not errors:
        return None
    blocks, kinds = facts.blocks, facts.kinds
    grid = np.full((len(kinds), len(blocks)), np.nan)
    for cell in facts.cells:
        grid[kinds.index(cell.kind), blocks.index(cell.block)] = cell.error or np.nan
    figure, axes = _figure(9.5, 1.3 + 0.3 * len(kinds))
    norm = LogNorm(min(errors), max(*errors, min(errors) * 1.01))
    # With few colours, matplotlib draws the colour bar as shapes instead of an image.
    colors = colormaps["cividis"].resampled(40)
    mesh = axes.pcolormesh(np.ma.masked_invalid(grid), cmap=colors, norm=norm)
    rings = [
        (blocks.index(cell.block) + 0.5, kinds.index(cell.kind) + 0.5)
        for cell in facts.cells
        if facts.outlier_names.intersection(layer.name for layer in cell.layers)
    ]
    if rings:
        x, y = zip(*rings, strict=True)
        # White on black is visible on every colour of the map.
        axes.scatter(x, y, s=60, facecolors="none", edgecolors="black", linewidths=3)
        axes.scatter(x, y, s=60, facecolors="none", edgecolors="white", linewidths=1.4)
    axes.set_yticks([i + 0.5 for i in range(len(kinds))], [_short(kind) for kind in kinds])
    _block_ticks(axes, len(blocks), 0.5)
    axes.invert_yaxis()
    axes.grid(visible=False)
    bar = figure.colorbar(mesh, ax=axes, label="relative output error", pad=0.01, aspect=12)
    bar.outline.set_visible(False)
    _log_ticks(bar.ax)
    return _svg(figure, "errors", "Relative output error of each layer, by block and kind")


def _depth_errors(facts: Facts) -> str | None:
    """Line: relative error of the hidden states after each block."""
    values = [block.depth_error for block in facts.manifest.blocks]
    if not any(values):
        return None
    figure, axes = _figure(9.5, 2.6)
    axes.plot(range(len(values)), [v or float("nan") for v in values], color=LINES[0][0],
              marker="o" if len(values) < 40 else None)  # fmt: skip
    axes.set_yscale("log")
    _log_ticks(axes)
    axes.set_ylabel("relative error")
    _block_ticks(axes, len(values), 0)
    return _svg(figure, "depth", "Relative error of the hidden states after each block")


def _kl_by_position(facts: Facts) -> str | None:
    """Lines: KL divergence by position in the window, for each model but the original."""
    all_models = facts.evaluation.models if facts.evaluation else []
    models = [model for model in all_models if model.kl_by_position]
    if not models:
        return None
    figure, axes = _figure(9.5, 2.6)
    for model, (color, marker, dashes) in zip(models, cycle(LINES), strict=False):
        positions, values = zip(*model.kl_by_position, strict=True)
        axes.plot(positions, values, color=color, marker=marker, linestyle=dashes,
                  label=_short(model.name))  # fmt: skip
    axes.set_yscale("log")
    _log_ticks(axes)
    axes.set_xlabel("position in the window")
    axes.set_ylabel("KL per token")
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return _svg(figure, "position", "KL divergence by position in the window")


def _bars(values: dict[str, float] | dict[str, int], unit: float, label: str) -> str | None:
    """Horizontal bars, one for each value; None if there are no values.

    Args:
        values: label -> value.
        unit: values are divided by it.
        label: name of the unit.
    """
    if not values:
        return None
    figure, axes = _figure(9.5, 0.7 + 0.27 * len(values))
    lengths = [value / unit for value in values.values()]
    bars = axes.barh(list(values), lengths, color=LINES[0][0], height=0.65)
    axes.bar_label(bars, fmt="{:,.1f}", padding=3, color=INK)
    axes.margins(x=0.08)
    axes.invert_yaxis()
    axes.set_xlabel(label)
    axes.grid(visible=False, axis="y")
    return _svg(figure, label, f"{label} by kind")


def _log_ticks(axes: Any) -> None:
    """Labels a logarithmic y axis with plain numbers at 1, 2 and 5 of each decade."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.2g}"))
    axes.yaxis.set_minor_locator(NullLocator())


def _block_ticks(axes: Any, count: int, offset: float) -> None:
    step = max(1, -(-count // 20))
    axes.set_xticks([i + offset for i in range(0, count, step)], [*range(0, count, step)])
    axes.set_xlabel("block")


def _figure(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _svg(figure: Any, name: str, title: str) -> str:
    """Returns a figure as an SVG element for a page: without metadata, and in the page's colours.

    Args:
        figure: matplotlib figure.
        name: prefix of all ids, which makes them unique in the page.
        title: description for screen readers.
    """
    buffer = io.StringIO()
    no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=no_metadata)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    for placeholder, color in COLORS.items():
        text = re.sub(re.escape(placeholder), color, text, flags=re.IGNORECASE)
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", text)
    text = re.sub(
        r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', rf'<svg viewBox="\1" {XLINK}>', text, count=1
    )
    return text.replace("<svg ", f'<svg role="img" aria-label="{title}" ', 1)


def _short(name: str) -> str:
    """Shortens a name to fit beside an axis; keeps its end, which differs more than its beginning."""
    return name if len(name) <= MAX_LABEL else f"…{name[-MAX_LABEL + 1 :]}"
