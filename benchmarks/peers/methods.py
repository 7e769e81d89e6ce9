"""Defines what is measured: every tool, its settings, bits and seeds.

The settings of the peers are those that their documentation recommends or offers for accuracy.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

Settings = dict[str, Any]

#: Group size for each bit width in the tables of the bundled model.
GROUPS = {2: 64, 3: 128, 4: 128}

#: roundwise: the two baselines and the default.
MAIN: dict[str, Settings] = {
    "rtn": {"method": "rtn"},
    "textbook": {"recipe": "textbook"},
    "best": {},
}
#: `best` without one ingredient, or `textbook` with one more.
ABLATION: dict[str, Settings] = {
    "best, natural order": {"order": "natural"},
    "best, static groups": {"order": "static"},
    "best, act-order in the file": {"desc_act": True},
    "best, grid min-max": {"grid": "minmax"},
    "best, grid mse": {"grid": "mse"},
    "best, 1 grid candidate": {"grid_candidates": 1},
    "best, 32 grid candidates": {"grid_candidates": 32},
    "best, positive scales": {"positive_scales": True},
    "best, alpha 0": {"alpha": 0.0},
    "best, beta 0": {"beta": 0.0},
    "best, alpha 0 and beta 0": {"alpha": 0.0, "beta": 0.0},
    "best, no refinement": {"refine": 0},
    "best, descent instead of exchange": {"exchange": 1},
    "best, 2 rounds of refinement": {"refine": 2},
    "best, outputs alike": {"output_tokens": 0},
    "best, gradients of 1024 tokens": {"output_tokens": 1024},
    "best, gradients of 16,384 tokens": {"output_tokens": 16384},
    "textbook, group-aware order": {"recipe": "textbook", "order": "group_aware"},
    "textbook, static groups": {"recipe": "textbook", "order": "static"},
    "textbook, act-order in the file": {"recipe": "textbook", "desc_act": True},
    "textbook, grid mse": {"recipe": "textbook", "grid": "mse"},
    "textbook, grid pivot": {"recipe": "textbook", "grid": "pivot"},
    "textbook, grid pivot, 8 candidates": {
        "recipe": "textbook",
        "grid": "pivot",
        "grid_candidates": 8,
    },
    "textbook, alpha 1": {"recipe": "textbook", "alpha": 1.0},
    "textbook, alpha 1 and beta 1": {"recipe": "textbook", "alpha": 1.0, "beta": 1.0},
    "textbook, refinement": {"recipe": "textbook", "refine": 1, "exchange": 8},
    "textbook, outputs coupled": {"recipe": "textbook", "output_tokens": 4096},
}
#: What only real models can settle: corrections, transforms and the order of work.
RISKS: dict[str, Settings] = {
    "best, alpha 0": {"alpha": 0.0},
    "best, beta 0": {"beta": 0.0},
    "best, alpha 0 and beta 0": {"alpha": 0.0, "beta": 0.0},
    "best, outputs alike": {"output_tokens": 0},
    "best, no refinement": {"refine": 0},
    "best, rotated": {"rotate": True},
    "best, damping 0.05": {"damp_percent": 0.05},
    "best, block mode": {"mode": "block"},
    "textbook, rotated": {"recipe": "textbook", "rotate": True},
}
GPTAQ, FOEM = {"alpha": 0.25}, {"alpha": 0.0, "beta": 0.2}
PEERS: dict[str, dict[str, Settings]] = {
    "gptqmodel": {
        "default": {},
        "desc_act": {"desc_act": True},
        "mse 2.4": {"mse": 2.4},
        "GPTAQ": {"gptaq": GPTAQ},
        "FOEM": {"foem": FOEM},
        "GPTAQ + FOEM": {"foem": {"alpha": 0.25, "beta": 0.2}},
        "mse 2.4, GPTAQ": {"mse": 2.4, "gptaq": GPTAQ},
        "desc_act, mse 2.4": {"desc_act": True, "mse": 2.4},
        "desc_act, mse 2.4, GPTAQ": {"desc_act": True, "mse": 2.4, "gptaq": GPTAQ},
        "desc_act, mse 2.4, GPTAQ 1.0": {"desc_act": True, "mse": 2.4, "gptaq": {"alpha": 1.0}},
    },
    "llmcompressor": {
        "default (actorder static)": {},
        "no actorder": {"actorder": None},
        "mse observer": {"observer": "mse"},
        "imatrix_mse observer": {"observer": "imatrix_mse"},
        "imatrix_mse observer, float32": {"observer": "imatrix_mse", "dtype": "float32"},
    },
    "autoround": {
        "default (200 iterations)": {},
        "light (50 iterations)": {"iters": 50, "lr": 5e-3},
        "best (1000 iterations)": {"iters": 1000},
        "enable_alg_ext": {"enable_alg_ext": True},
    },
}  # fmt: skip
TOOLS = ("roundwise", *PEERS)
#: Methods that run with every seed; all others run with the first one, unless named with --method.
ALL_SEEDS = ("textbook", "best", *(next(iter(options)) for options in PEERS.values()))


@dataclass(frozen=True)
class Job:
    """One run of one tool."""

    tool: str
    method: str
    bits: int
    group_size: int
    sym: bool
    seed: int
    settings: Settings

    @property
    def format(self) -> str:
        """Bits, group size and symmetry in words."""
        return f"{self.bits} bit, g{self.group_size}, {'sym' if self.sym else 'asym'}"

    @property
    def row(self) -> str:
        """The name of its row in the tables."""
        return f"{self.tool} {self.method}"


def jobs(
    tools: list[str],
    formats: list[tuple[int, int, bool]],
    seeds: list[int],
    more: dict[str, Settings],
    wanted: str,
) -> Iterator[Job]:
    """Yields all jobs of the selected tools.

    Args:
        tools: their names.
        formats: bits, group size and symmetry.
        seeds: seeds of the calibration windows.
        more: methods of roundwise beside `MAIN`.
        wanted: a method's name, a part of one, or empty.
    """
    for tool in tools:
        methods = MAIN | more if tool == "roundwise" else PEERS[tool]
        for method, options in methods.items():
            if wanted != method and (wanted in methods or wanted not in method):
                continue
            chosen = seeds if method in ALL_SEEDS or wanted else seeds[:1]
            for seed in [0] if method == "rtn" else chosen:
                for bits, group_size, sym in formats:
                    settings = settings_of(tool, options, bits, group_size, sym)
                    yield Job(tool, method, bits, group_size, sym, seed, settings)


def settings_of(tool: str, options: Settings, bits: int, group_size: int, sym: bool) -> Settings:
    """Returns `options` with bits, group size and symmetry, under the tool's own names."""
    if tool == "llmcompressor":
        weights = {
            "num_bits": bits, "type": "int", "symmetric": sym, "strategy": "group",
            "group_size": group_size,
        }  # fmt: skip
        others = dict(options)
        if "observer" in others:
            weights["observer"] = others.pop("observer")
        return {"weights": weights, **others}
    common = {"bits": bits, "group_size": group_size, "sym": sym}
    if tool == "gptqmodel" and not sym:
        common["format"] = "gptq_v2"  # v1 cannot hold a zero point of 0
    return common | options
