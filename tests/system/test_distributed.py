"""One rank alone, shares of several ranks, and errors (for several processes: test_ranks.py)."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from roundwise.errors import ConfigError, RunError
from roundwise.system.device import HOST
from roundwise.system.distributed import Ranks, current_ranks, join_process_group


def test_a_single_rank_exchanges_nothing() -> None:
    ranks, values = Ranks(), torch.ones(3)
    assert ranks.is_first and ranks.is_single
    assert ranks.broadcast_object(lambda: values) is values
    assert ranks.all_gather_object(values)[0] is values
    assert ranks.all_reduce_sum(values) is ranks.all_gather_rows(values, 3) is values
    assert ranks.all_reduce_max(3, -1) == [3, -1]
    assert ranks.shard("ab") == {0: "a", 1: "b"}


def test_without_torchrun_there_is_one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with join_process_group() as ranks:
        assert (ranks.rank, ranks.count, ranks.local) == (0, 1, 1)
    assert current_ranks().is_single


def test_items_and_rows_are_split_without_gaps() -> None:
    shards = [Ranks(rank, 3).shard("abcdefg") for rank in range(3)]
    assert shards == [{0: "a", 3: "d", 6: "g"}, {1: "b", 4: "e"}, {2: "c", 5: "f"}]
    rows = [Ranks(rank, 3).row_range(7) for rank in range(3)]
    assert rows == [slice(0, 2), slice(2, 4), slice(4, 7)]
    assert Ranks(0, 3).row_range(1) == slice(0, 0)


def test_ranks_use_the_devices_of_their_machine_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    class TwoDevices:
        @staticmethod
        def device_count() -> int:
            return 2

    monkeypatch.setattr(torch, "get_device_module", lambda _: TwoDevices)
    cuda = torch.device("cuda")
    devices = []
    for rank in range(3):
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        devices.append(str(Ranks(rank, 3, 3).local_device(cuda)))
    assert devices == ["cuda:0", "cuda:1", "cuda:0"]
    assert Ranks(0, 3, 3).local_device(torch.device("cuda:1")) == torch.device("cuda:1")
    assert Ranks().local_device(cuda) == cuda
    assert Ranks(0, 3, 3).processes_sharing(cuda) == 2
    assert Ranks(0, 3, 3).processes_sharing(HOST) == 3


def test_a_lost_rank_is_an_error_that_says_how_to_resume(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("[gloo/transport] Connection closed by peer\nmore")

    monkeypatch.setattr("torch.distributed.all_reduce", fail)
    with pytest.raises(RunError, match=r"another rank has ended .*closed by peer\); finished"):
        Ranks(0, 2).all_reduce_sum(torch.ones(1))


def test_ranks_that_differ_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = Ranks(0, 2)
    monkeypatch.setattr(
        ranks, "all_gather_object", lambda mine: [mine, {**mine, "processor": "AVX2"}]
    )
    with pytest.raises(ConfigError, match=r"rank 1 differs from rank 0 in processor \(AVX2, AVX5"):
        ranks.check_identical({"threads": 1, "processor": "AVX512"})
    monkeypatch.setattr(ranks, "all_gather_object", lambda mine: [mine, mine])
    ranks.check_identical({"threads": 1})
