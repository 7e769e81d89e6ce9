"""Dispatch takes the fastest kernel that supports a layer, or the one that is named."""

from __future__ import annotations

import pytest

from roundwise.core.backends import cpp
from roundwise.errors import ConfigError
from roundwise.inference.kernels.base import PackedWeight
from roundwise.inference.kernels.cpp import NativeKernel
from roundwise.inference.kernels.dispatch import KERNELS, choose_kernel
from roundwise.inference.kernels.reference import ReferenceKernel
from roundwise.inference.kernels.triton import TritonKernel
from tests.inference.kernels.packed import random_weight
from tests.inference.kernels.test_cpp import needs_native

WEIGHT = random_weight(4, 128, 64, 64)


@needs_native
def test_the_cpp_kernel_on_the_cpu() -> None:
    assert choose_kernel(WEIGHT) is NativeKernel


def test_the_reference_kernel_without_the_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpp, "load", lambda: (None, cpp.Status(None, "not built")))
    assert choose_kernel(WEIGHT) is ReferenceKernel
    with pytest.raises(ConfigError, match=r"native cannot compute this layer: .* not built"):
        choose_kernel(WEIGHT, "native")


def test_a_name_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROUNDWISE_KERNEL", "reference")
    assert choose_kernel(WEIGHT) is ReferenceKernel
    if cpp.load()[0] is not None:
        assert choose_kernel(WEIGHT, "native") is NativeKernel  # the argument wins
    monkeypatch.setenv("ROUNDWISE_KERNEL", "fast")
    with pytest.raises(ConfigError, match="there is no kernel 'fast'"):
        choose_kernel(WEIGHT)


def test_an_unknown_name() -> None:
    names = ", ".join(kernel.name for kernel in KERNELS)
    with pytest.raises(ConfigError, match=f"there is no kernel 'fast': use {names}"):
        choose_kernel(WEIGHT, "fast")


def test_another_device() -> None:
    away = PackedWeight(
        *(t.to("meta") for t in (WEIGHT.qweight, WEIGHT.qzeros, WEIGHT.scales)), None, 4, 1
    )
    assert "not on meta" in str(NativeKernel.unsupported_reason(away))
    assert choose_kernel(away) is ReferenceKernel


def test_the_first_that_supports_a_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    for kernel in KERNELS:
        monkeypatch.setattr(kernel, "unsupported_reason", lambda _: None)
    assert choose_kernel(WEIGHT) is TritonKernel
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert choose_kernel(WEIGHT) is NativeKernel  # Triton's interpreter is used by name only
    assert choose_kernel(WEIGHT, "triton") is TritonKernel
    monkeypatch.setattr(NativeKernel, "unsupported_reason", lambda _: "no reason")
    assert choose_kernel(WEIGHT) is ReferenceKernel
