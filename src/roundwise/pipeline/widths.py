"""`--target-bpw`: a width for each layer, so that a model of a given size loses least.

`survey` measures, `choice` chooses; what was chosen stands in `dynamic`, where a run that goes on, and
one that is made again from its manifest, find it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from roundwise.config import QuantizeConfig
from roundwise.models.skeleton import Skeleton
from roundwise.models.verify import read_manifest
from roundwise.pipeline.calibration import Calibration
from roundwise.pipeline.choice import as_dynamic, choose, is_open
from roundwise.pipeline.journal import read_journal
from roundwise.pipeline.survey import survey


def with_widths(
    skeleton: Skeleton,
    config: QuantizeConfig,
    texts: Calibration,
    out: Path,
    again: Callable[[], Skeleton],
) -> QuantizeConfig:
    """`config` with a width for every layer in `dynamic`: that of a run in `out`, or chosen now.

    Args:
        skeleton: of the model.
        config: with `target_bpw`; what its `dynamic` settles stays.
        texts: calibration.
        out: folder of the result, where an earlier run of the same command may have chosen.
        again: opens another skeleton, which the survey uses up.

    Raises:
        ConfigError: the size cannot be reached.
    """
    if config.target_bpw is None or not _undecided(skeleton, config):
        return config
    found = _earlier(skeleton, config, texts, out)
    if found is None:
        units = survey(again(), config, texts)
        found = {**config.dynamic, **as_dynamic(choose(units, config.target_bpw))}
    return config.model_copy(update={"dynamic": found})


def _earlier(
    skeleton: Skeleton, config: QuantizeConfig, texts: Calibration, out: Path
) -> dict[str, dict[str, Any] | None] | None:
    """What an earlier run of the same command chose, finished or not."""
    manifest = read_manifest(out) if out.is_dir() else None
    known = manifest["run"] if manifest else read_journal(out)[0]
    if known is None or known["calibration"] != texts.describe():
        return None
    rules = [(pattern, changes) for pattern, changes in known["config"]["dynamic"]]
    own = [*config.dynamic.items()]
    wanted = config.model_dump(mode="json")
    alike = {**known["config"], "dynamic": None} == {**wanted, "dynamic": None}
    if not alike or rules[: len(own)] != own:
        return None
    return dict(rules) if known["model"] == skeleton.checkpoint.identity() else None


def _undecided(skeleton: Skeleton, config: QuantizeConfig) -> bool:
    """Whether there is a layer that no pattern of `dynamic` settles."""
    return any(
        is_open(name, config)
        for block in skeleton.blocks
        if not block.is_head
        for name in block.linears
    )
