"""Formats results as markdown: a summary by bits and symmetry, then every method."""

from collections import defaultdict
from statistics import fmean
from typing import Any

from peers.methods import ABLATION, MAIN, PEERS, RISKS

Record = dict[str, Any]
#: Bits, group size and symmetry.
Variant = tuple[int, int, bool]
#: Records of one variant, by the name of the row.
Rows = dict[str, list[Record]]
#: Targets: largest KL of the default recipe divided by that of rounding, and by that of textbook GPTQ.
TARGETS = {2: (0.10, 0.27), 3: (0.125, 0.36), 4: (0.145, 0.43)}
ORDER = [
    *(f"roundwise {name}" for name in MAIN),
    *(f"{tool} {name}" for tool, options in PEERS.items() for name in options),
]


def ingredients(records: list[Record]) -> str:
    """Returns the table of roundwise with each ingredient removed or added, first seed."""
    ours = [r for r in records if r["key"]["tool"] == "roundwise" and r["key"]["seed"] == 0]
    lines = []
    more = ABLATION | RISKS
    variants = {_variant(r) for r in ours if r["key"]["method"] in more}
    for variant in sorted(variants, key=_place):
        here = [r for r in ours if _variant(r) == variant]
        rows = {r["key"]["method"]: r for r in here if "kl" in r}
        rtn = rows["rtn"]["kl"] if "rtn" in rows else None
        lines += [
            f"| {_title(variant)} | KL to the original | top-1 agreement | over RTN "
            "| CPU seconds | peak MB |",
            "|---|---|---|---|---|---|",
        ]
        for name in [*MAIN, *more]:
            if name in rows:
                r = rows[name]
                over = f"{r['kl'] / rtn:.3f}" if rtn else ""
                cells = [name, f"{r['kl']:.6f}", f"{r['top1']:.2%}", over]
                cells += [f"{r['cpu_seconds']:.0f}", f"{r['peak_bytes'] / 1e6:.0f}"]
                lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines[:-1])


def report(records: list[Record]) -> str:
    """Returns all tables of one model and text, except the table of single ingredients."""
    records = [r for r in records if r["key"]["method"] not in ABLATION | RISKS]
    groups: dict[Variant, Rows] = defaultdict(lambda: defaultdict(list))
    for record in records:
        key = record["key"]
        groups[_variant(record)][f"{key['tool']} {key['method']}"].append(record)
    if not groups:
        return "no results yet"
    ordered = sorted(groups, key=_place)
    lines = _summary({group: groups[group] for group in ordered})
    for variant in ordered:
        lines += ["", f"### {_title(variant)}", "", *_details(groups[variant])]
    return "\n".join([*lines, "", *_provenance(records)])


def _variant(record: Record) -> Variant:
    key = record["key"]
    return key["bits"], key["group_size"], key["sym"]


def _place(variant: Variant) -> tuple[bool, int, int]:
    """Returns a sort key: symmetric variants first, then by width and group size."""
    bits, group_size, sym = variant
    return not sym, bits, group_size


def _title(variant: Variant) -> str:
    bits, group_size, sym = variant
    return f"{bits} bit, g{group_size}, {'symmetric' if sym else 'asymmetric'}"


def _kl(group: Rows, row: str) -> float | None:
    values = [record["kl"] for record in group.get(row, []) if "kl" in record]
    return fmean(values) if values else None


def _best_peer(group: Rows) -> tuple[str, float] | None:
    peers = [
        (row, kl)
        for row in group
        if not row.startswith("roundwise") and (kl := _kl(group, row)) is not None
    ]
    return min(peers, key=lambda item: item[1], default=None)


def _summary(groups: dict[Variant, Rows]) -> list[str]:
    """Returns one row per width and symmetry: the default recipe, the baselines and the best peer."""
    lines = [
        "| | KL of roundwise | over RTN's (wanted) | over textbook GPTQ's (wanted) "
        "| best peer | its KL | roundwise over it |",
        "|---|---|---|---|---|---|---|",
    ]
    for variant, group in groups.items():
        best = _kl(group, "roundwise best")
        if best is None:
            continue
        cells = [_title(variant), f"{best:.6f}"]
        for row, wanted in zip(("rtn", "textbook"), TARGETS[variant[0]], strict=True):
            base = _kl(group, f"roundwise {row}")
            cells.append(f"{best / base:.3f} (≤ {wanted:g})" if base else "")
        peer = _best_peer(group)
        cells += [peer[0], f"{peer[1]:.6f}", f"{best / peer[1]:.2f}"] if peer else ["", "", ""]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _details(group: Rows) -> list[str]:
    """Returns one row per method."""
    base = next(r["base_perplexity"] for records in group.values() for r in records if "kl" in r)
    lines = [
        f"| method (original perplexity {base:.3f}) | seeds | perplexity | KL to the original "
        "| top-1 agreement | over RTN | over textbook | trivial g_idx | CPU seconds | peak MB |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    rtn, textbook = _kl(group, "roundwise rtn"), _kl(group, "roundwise textbook")
    for row in sorted(group, key=lambda name: ORDER.index(name) if name in ORDER else len(ORDER)):
        good = [record for record in group[row] if "kl" in record]
        if not good:
            lines.append(f"| {row} | | {_escaped(group[row][0]['error'])} | | | | | | | |")
            continue
        kl = fmean(record["kl"] for record in good)
        cells = [
            row, str(len(good)), _spread(good, "perplexity", 3), _spread(good, "kl", 6),
            f"{fmean(r['top1'] for r in good):.2%}",
            f"{kl / rtn:.3f}" if rtn else "", f"{kl / textbook:.3f}" if textbook else "",
            "yes" if all(r["trivial_g_idx"] for r in good) else "no",
            f"{fmean(r['cpu_seconds'] for r in good):.0f}",
            f"{max(r['peak_bytes'] for r in good) / 1e6:.0f}",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _spread(records: list[Record], field: str, digits: int) -> str:
    """Returns the mean, and half of the range over the seeds."""
    values = [record[field] for record in records]
    mean = f"{fmean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {(max(values) - min(values)) / 2:.{digits}f}"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")


def _provenance(records: list[Record]) -> list[str]:
    """Returns a line with the versions and machines of the results."""
    versions = {f"{r['key']['tool']} {r['version']}" for r in records if "version" in r}
    machines = {record["machine"] for record in records}
    key = records[0]["key"]
    return [
        f"Versions: {', '.join(sorted(versions))}. Machine: {'; '.join(sorted(machines))}. "
        f"Model {key['model']}, text {key['text']}: {key['windows'][0]} windows of {key['windows'][1]} "
        f"tokens for calibration, {key['tokens']} held-out tokens."
    ]
