"""Facts of runs that never took place, for tests of the report."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import roundwise as rw
from roundwise.checkpoint.manifest import LayerRecord, Manifest, RunRecord
from roundwise.evaluation.report.facts import Facts, find_outliers, make_cells

KINDS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
         "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")  # fmt: skip


def layer(name: str, error: float | None = 0.001, **changes: Any) -> LayerRecord:
    return LayerRecord(**{
        "name": name, "bits": 4, "group_size": 128, "relative_error": error, "weight_error": 0.01,
        "damp_percent": 0.01, "damp_tried": [0.01], "tokens": 1000, "fallback": None, **changes,
    })  # fmt: skip


def facts(
    layers: Sequence[LayerRecord],
    experts: Iterable[Any] = (),
    name: str = "a model",
    **changes: Any,
) -> Facts:
    cells = make_cells([*layers])
    blocks = list(dict.fromkeys(cell.block for cell in cells))
    calibration = {
        "source": "notes.txt", "samples": 5, "wanted": 5, "seq_len": 14, "batch_size": 1, "seed": 0,
        "tokens": 70, "sha256": "", "sketch": [1], "distinct": 9, "unique_share": 0.5,
    }  # fmt: skip
    manifest = Manifest.model_validate({
        "run": {
            "config": rw.QuantizeConfig().model_dump(mode="json"), "threads": 2,
            "versions": {"roundwise": "1"}, "calibration": calibration,
        },
        "mode": "true_sequential", "bits_per_weight": 4.2, "bytes_before": 10, "bytes_after": 4,
        "layers": [each.as_json() for each in layers], "experts": [*experts],
        "files": {"config.json": "abc"},
        "blocks": [
            {"name": block, "depth_error": 1e-3 * (i + 1)}
            for i, block in enumerate(blocks)
        ],
        "given": {"model": name, "calibration": "notes.txt"},
    })  # fmt: skip
    run = RunRecord(
        seconds=3.0, phases={"forward": 2.0, "solve": 1.0}, blocks=[1.0, 2.0],
        peak_rss_bytes=10**9, warnings=[], not_as_asked=[],
    )  # fmt: skip
    fields = {
        "name": name, "manifest": manifest, "run": run, "cells": cells,
        "outliers": find_outliers(cells), "sizes": {"codes": 4}, "issues": [],
    }  # fmt: skip
    return Facts(**{**fields, **changes})
