"""Runs on each rank under torchrun: ranks_script.py CASES.json; see test_ranks.py.

Sums are in float64 here, so that their order does not matter: several ranks must give the result of one.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partialmethod
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import roundwise as rw
from roundwise.core.hessian import CrossMoment, Hessian
from roundwise.system.distributed import join_process_group


@contextmanager
def exact_sums() -> Iterator[None]:
    """Context manager: Hessians and cross moments are summed in float64, and used in float32."""
    with ExitStack() as stack:
        for kind, names in ((Hessian, ("mean", "take_mean")), (CrossMoment, ("take_mean",))):
            defaults = kind.__init__.__kwdefaults__
            stack.enter_context(mock.patch.dict(defaults, {"dtype": torch.float64}))
            for name in names:
                rounded = partialmethod(_rounded, getattr(kind, name))
                stack.enter_context(mock.patch.object(kind, name, rounded))
        yield


def _rounded(sums: Any, mean: Callable[..., torch.Tensor], **options: Any) -> torch.Tensor:
    return mean(sums, **options).to(torch.float32)


def quantize(model: str, out: str, settings: dict[str, Any], options: dict[str, Any]) -> Any:
    """Runs one case: a small model with groups of 32, and other settings."""
    with exact_sums():
        config = rw.QuantizeConfig(**{"group_size": 32, **settings})
        return rw.quantize(model, out, config, **options)


def main() -> None:
    cases, results = json.loads(Path(sys.argv[1]).read_text()), []
    with join_process_group() as ranks:
        for case in cases:
            try:
                result = quantize(**case)
                results.append({name: result.as_dict()[name] for name in ("layers", "experts")})
            except rw.RoundwiseError as error:
                results.append({"error": f"{type(error).__name__}: {error}"})
        uneven = torch.arange(3 * 5).view(5, 3)[ranks.row_range(5)].to(torch.float16)
        one_row = torch.ones(1, 2, dtype=torch.uint8)[ranks.row_range(1)]
        collectives = {
            "rank": int(os.environ["RANK"]),
            "broadcast": ranks.broadcast_object(lambda: ["of", ranks.rank]),
            "gathered": ranks.all_gather_object(
                {"rank": ranks.rank, "long": "x" * 100 * ranks.rank}
            ),
            "max": ranks.all_reduce_max(ranks.rank, -ranks.rank),
            "sum": ranks.all_reduce_sum(torch.tensor([1.0, ranks.rank])).tolist(),
            "rows": ranks.all_gather_rows(uneven, 5).tolist(),
            "one row": ranks.all_gather_rows(one_row, 1).tolist(),
            "shard": list(ranks.shard("abcde").items()),
        }
    output = json.dumps({"cases": results, "collectives": collectives})
    Path(f"{sys.argv[1]}.{ranks.rank}").write_text(output)


if __name__ == "__main__":
    main()
