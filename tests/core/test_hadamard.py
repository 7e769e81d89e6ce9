"""The rotation is orthogonal, mixes all channels, and has the same bits everywhere."""

from __future__ import annotations

import hashlib

import pytest
import torch

from roundwise.core.hadamard import MAX_ODD, Rotation
from roundwise.errors import ConfigError

WIDTHS = pytest.mark.parametrize("width", [1, 2, 3, 7, 64, 96, 256, 896])
MEANS = pytest.mark.parametrize("keeps_mean", [False, True])


def matrix(rotation: Rotation) -> torch.Tensor:
    return rotation.rows(torch.eye(rotation.width))


@WIDTHS
@MEANS
def test_is_orthogonal(width: int, keeps_mean: bool) -> None:
    Q = matrix(Rotation(width, 0, keeps_mean=keeps_mean))
    torch.testing.assert_close(Q @ Q.T, torch.eye(width, dtype=torch.float64))


@WIDTHS
def test_keeps_the_mean_when_asked_to(width: int) -> None:
    Q = matrix(Rotation(width, 0, keeps_mean=True))
    torch.testing.assert_close(Q.sum(dim=0), torch.ones(width, dtype=torch.float64))


def test_is_linear_in_rows_of_any_shape_and_type() -> None:
    rotation = Rotation(96, 3)
    X = torch.randn(2, 5, 96)
    torch.testing.assert_close(rotation.rows(X), X.double() @ matrix(rotation))
    half = X.to(torch.bfloat16)
    torch.testing.assert_close(rotation.rows(half), half.double() @ matrix(rotation))


def test_spreads_one_channel_over_all_others() -> None:
    # Where the width is a power of two, perfectly evenly: every entry of Q has the same size.
    flat = matrix(Rotation(256, 0)).abs()
    torch.testing.assert_close(flat, torch.full_like(flat, 1 / 16))
    for rotation in (Rotation(896, 0), Rotation(256, 0, keeps_mean=True), Rotation(96, 0)):
        assert float(matrix(rotation).abs().max()) < 0.4


def test_follows_the_seed() -> None:
    a, b, c = (matrix(Rotation(96, seed)) for seed in (1, 1, 2))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


@pytest.mark.parametrize("threads", [1, 2])
def test_has_the_same_bits_everywhere(threads: int) -> None:
    # The hash was taken once: what was written on one machine is checked on another.
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    X = (torch.arange(200 * 896).view(200, 896) % 251).to(torch.float64) / 7
    digest = hashlib.sha256()
    for keeps_mean in (False, True):
        digest.update(Rotation(896, 5, keeps_mean=keeps_mean).rows(X).numpy().tobytes())
    torch.set_num_threads(before)
    assert digest.hexdigest() == BITS


BITS = "11f2e583e94d9228a556ec5820ad353f5a02e198aef0ef7104bfc318612044b3"


def test_refuses_a_width_with_a_large_odd_factor() -> None:
    Rotation(4 * MAX_ODD, 0)
    with pytest.raises(ConfigError, match=r"1028 channels cannot be rotated: its odd factor 257"):
        Rotation(4 * 257, 0)
