"""What each rank runs under torchrun: ranks_script.py CASES.json; see test_ranks.py.

Sums are in float64 here, in which their order is not seen: several ranks must make what one makes.
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
    """Hessians and cross moments are summed up in float64, and used in float32."""
    with ExitStack() as stack:
        for kind in (Hessian, CrossMoment):
            defaults, mean = kind.__init__.__kwdefaults__, kind.mean
            stack.enter_context(mock.patch.dict(defaults, {"dtype": torch.float64}))
            rounded = partialmethod(_rounded, mean)
            stack.enter_context(mock.patch.object(kind, "mean", rounded))
        yield


def _rounded(sums: Any, mean: Callable[..., torch.Tensor], **options: Any) -> torch.Tensor:
    return mean(sums, **options).to(torch.float32)


def quantize(model: str, out: str, settings: dict[str, Any], options: dict[str, Any]) -> Any:
    """One case: the bundled settings of a small model, or others."""
    with exact_sums():
        config = rw.QuantizeConfig(**{"group_size": 32, **settings})
        return rw.quantize(model, out, config, **options)


def main() -> None:
    cases, found = json.loads(Path(sys.argv[1]).read_text()), []
    with join_process_group() as ranks:
        for case in cases:
            try:
                result = quantize(**case)
                found.append({"layers": result.layers, "experts": result.experts})
            except rw.RoundwiseError as error:
                found.append({"error": f"{type(error).__name__}: {error}"})
        uneven = torch.arange(3 * 5).view(5, 3)[ranks.row_range(5)].to(torch.float16)
        few = torch.ones(1, 2, dtype=torch.uint8)[ranks.row_range(1)]
        tools = {
            "rank": int(os.environ["RANK"]),
            "agree": ranks.broadcast_object(lambda: ["of", ranks.rank]),
            "each": ranks.all_gather_object({"rank": ranks.rank, "long": "x" * 100 * ranks.rank}),
            "largest": ranks.all_reduce_max(ranks.rank, -ranks.rank),
            "sum": ranks.all_reduce_sum(torch.tensor([1.0, ranks.rank])).tolist(),
            "rows": ranks.all_gather_rows(uneven, 5).tolist(),
            "few": ranks.all_gather_rows(few, 1).tolist(),
            "share": list(ranks.shard("abcde").items()),
        }
    Path(f"{sys.argv[1]}.{ranks.rank}").write_text(json.dumps({"cases": found, "tools": tools}))


if __name__ == "__main__":
    main()
