"""Charts as SVG that goes into a page: their text takes the page's colour, in light and dark.

Drawn by matplotlib. Lines differ in marks and dashes as well as in colour (Okabe & Ito's, which everyone
can tell apart), and the heat map's colours (cividis) get lighter evenly for every kind of eye.
"""

from __future__ import annotations

import io
import re
from itertools import cycle
from typing import Any

from roundwise.evaluation.report.facts import Facts

#: Drawn as these, and turned into what the page says.
INK, FAINT = "#010203", "#040506"
COLORS = {
    INK: "currentColor", FAINT: "var(--faint)",
    "#0072b2": "var(--blue)", "#d55e00": "var(--red)", "#009e73": "var(--green)",
    "#e69f00": "var(--yellow)", "#cc79a7": "var(--pink)",
}  # fmt: skip
LINES = list(zip(list(COLORS)[2:], "osD^v", ("-", "--", "-.", ":", "-"), strict=True))
STYLE = {
    "svg.fonttype": "none", "svg.hashsalt": "roundwise", "text.parse_math": False,
    "font.family": "sans-serif", "font.size": 10, "text.color": INK, "axes.labelcolor": INK,
    "axes.edgecolor": FAINT, "xtick.color": INK, "ytick.color": INK, "grid.color": FAINT,
    "grid.linewidth": 0.6, "axes.spines.top": False, "axes.spines.right": False,
    "legend.frameon": False, "axes.grid": True, "axes.axisbelow": True,
}  # fmt: skip
#: What matplotlib refers to its own shapes with.
XLINK = 'xmlns:xlink="http://www.w3.org/1999/xlink"'
#: Characters of a name on an axis.
LONGEST = 44


def charts(facts: Facts) -> dict[str, str]:
    """All charts that there is something to draw for, by name: SVG."""
    import matplotlib as mpl

    with mpl.rc_context(STYLE):  # type: ignore[arg-type]
        drawn = {
            "errors": _errors(facts),
            "depth": _depth(facts),
            "sizes": _bars(facts.sizes, 1e6, "MB"),
            "saturation": _saturation(facts),
            "position": _position(facts),
        }
        if facts.run is not None:
            phases = dict(sorted(facts.run.phases.items(), key=lambda item: -item[1]))
            drawn["phases"] = _bars(phases, 1, "seconds")
    return {name: svg for name, svg in drawn.items() if svg is not None}


def _errors(facts: Facts) -> str | None:
    """Relative output error by block (across) and kind of layer (down)."""
    import numpy as np
    from matplotlib import colormaps
    from matplotlib.colors import LogNorm

    known = [cell.error for cell in facts.cells if cell.error]
    if not known:
        return None
    blocks, kinds = facts.blocks, facts.kinds
    grid = np.full((len(kinds), len(blocks)), np.nan)
    for cell in facts.cells:
        grid[kinds.index(cell.kind), blocks.index(cell.block)] = cell.error or np.nan
    figure, axes = _figure(9.5, 1.3 + 0.3 * len(kinds))
    norm = LogNorm(min(known), max(*known, min(known) * 1.01))
    # Few enough colours that their bar is drawn as shapes, not as a picture.
    colors = colormaps["cividis"].resampled(40)
    mesh = axes.pcolormesh(np.ma.masked_invalid(grid), cmap=colors, norm=norm)
    rings = [
        (blocks.index(cell.block) + 0.5, kinds.index(cell.kind) + 0.5)
        for cell in facts.cells
        if facts.standing_out.intersection(layer.name for layer in cell.layers)
    ]
    if rings:
        across, down = zip(*rings, strict=True)
        # White on black: seen on any colour of the map.
        axes.scatter(across, down, s=60, facecolors="none", edgecolors="black", linewidths=3)
        axes.scatter(across, down, s=60, facecolors="none", edgecolors="white", linewidths=1.4)
    axes.set_yticks([i + 0.5 for i in range(len(kinds))], [_short(kind) for kind in kinds])
    _block_ticks(axes, len(blocks), 0.5)
    axes.invert_yaxis()
    axes.grid(visible=False)
    bar = figure.colorbar(mesh, ax=axes, label="relative output error", pad=0.01, aspect=12)
    bar.outline.set_visible(False)
    _log_ticks(bar.ax)
    return _svg(figure, "errors", "Relative output error of each layer, by block and kind")


def _depth(facts: Facts) -> str | None:
    """Distance of the hidden states from the original's behind each block."""
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
    return _svg(figure, "depth", "Relative error of the hidden states behind each block")


def _saturation(facts: Facts) -> str | None:
    """Error on held-out windows against the tokens that were solved from, of that from most tokens."""
    watched = [b.saturation for b in facts.manifest.blocks if b.saturation]
    if not watched:
        return None
    figure, axes = _figure(9.5, 3.0)
    for each, (color, marker, dashes) in zip(watched, cycle(LINES), strict=False):
        tokens = [point.tokens for point in each.points]
        errors = [point.relative_error for point in each.points]
        more = [100 * (error / errors[-1] - 1) for error in errors]
        axes.plot(tokens, more, color=color, marker=marker, linestyle=dashes,
                  label=_short(each.name))  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_xticks(tokens, [f"{count:,}" for count in tokens])
    axes.minorticks_off()
    axes.set_xlabel("calibration tokens solved from")
    axes.set_ylabel("% more held-out error")
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return _svg(figure, "saturation", "Error on held-out windows, by number of calibration tokens")


def _position(facts: Facts) -> str | None:
    """KL divergence by position in the window, of each model but the original."""
    models = [m for m in (facts.evaluation.models if facts.evaluation else []) if m.kl_by_position]
    if not models:
        return None
    figure, axes = _figure(9.5, 2.6)
    for model, (color, marker, dashes) in zip(models, cycle(LINES), strict=False):
        at, values = zip(*model.kl_by_position, strict=True)
        axes.plot(at, values, color=color, marker=marker, linestyle=dashes,
                  label=_short(model.name))  # fmt: skip
    axes.set_yscale("log")
    _log_ticks(axes)
    axes.set_xlabel("position in the window")
    axes.set_ylabel("KL per token")
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return _svg(figure, "position", "KL divergence by position in the window")


def _bars(values: dict[str, float] | dict[str, int], unit: float, label: str) -> str | None:
    """One bar for each value."""
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
    """Plain numbers at 1, 2 and 5 of each decade of a logarithmic y axis."""
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
    """The figure without what belongs to a file of its own; ids are the page's, so they carry a name."""
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    for drawn, shown in COLORS.items():
        text = re.sub(re.escape(drawn), shown, text, flags=re.IGNORECASE)
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", text)
    text = re.sub(
        r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', rf'<svg viewBox="\1" {XLINK}>', text, count=1
    )
    return text.replace("<svg ", f'<svg role="img" aria-label="{title}" ', 1)


def _short(name: str) -> str:
    """A name that fits beside an axis: its end tells more than its beginning."""
    return name if len(name) <= LONGEST else f"…{name[-LONGEST + 1 :]}"
