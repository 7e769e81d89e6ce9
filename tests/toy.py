"""An accelerator for tests: a device written in Python, whose tensors live in this process's memory.

Like a GPU it refuses operations that mix its tensors with those of the CPU. Its results equal the CPU's
bit for bit. So code that should run on any device can be tested without one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

NAME = "toy"
aten = torch.ops.aten
#: Operations that move tensors between devices.
COPIES = (aten._to_copy.default, aten.copy_.default)
#: Operations whose results are not tensors of the device.
NUMBERS = (aten._local_scalar_dense.default,)


class OnToy(torch.Tensor):
    """A tensor on the device; `value` holds its numbers."""

    value: torch.Tensor
    offloaded: bool

    @staticmethod
    def __new__(cls, value: torch.Tensor) -> OnToy:
        made = torch.Tensor._make_wrapper_subclass(
            cls, value.shape, strides=value.stride(), storage_offset=value.storage_offset(),
            dtype=value.dtype, device=torch.device(NAME, 0),
        )  # fmt: skip
        made.value, made.offloaded = value, False
        return made

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _run(func, args, kwargs or {})

    @property
    def data(self) -> torch.Tensor:
        return self

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        """Moves the tensor to another device, where it cannot be used, or back."""
        self.offloaded = not isinstance(value, OnToy)
        self.value = value.value if isinstance(value, OnToy) else value
        Backend.offloaded += self.offloaded

    def data_ptr(self) -> int:
        return self.value.data_ptr()

    def tolist(self) -> Any:
        return self.value.tolist()

    def numpy(self, *, force: bool = False) -> Any:
        raise TypeError(f"a tensor on {NAME} is not a numpy array")


class _Everywhere(TorchDispatchMode):
    """Also handles operations that create tensors on the device, or move them there."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _run(func, args, kwargs or {})


class Backend:
    """The functions that torch calls on a device's module."""

    FREE, PEAK = 64 << 30, 123456
    synchronized = offloaded = 0

    def is_available(self) -> bool:
        return True

    def is_initialized(self) -> bool:
        return True

    def _is_in_bad_fork(self) -> bool:
        return False

    def device_count(self) -> int:
        return 1

    def current_device(self) -> int:
        return 0

    def manual_seed_all(self, seed: int) -> None:
        pass

    def get_rng_state(self, device: Any) -> torch.Tensor:
        return torch.zeros(1)

    def set_rng_state(self, state: torch.Tensor, device: Any) -> None:
        pass

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def get_device_name(self, device: Any) -> str:
        return "Toy 1"

    def mem_get_info(self, device: Any) -> tuple[int, int]:
        return self.FREE, self.FREE

    def max_memory_allocated(self, device: Any) -> int:
        return self.PEAK

    def synchronize(self, device: Any) -> None:
        Backend.synchronized += 1


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Runs an operation on the CPU tensors inside; its results are on the device if its inputs were."""
    flat, spec = tree_flatten((args, kwargs))
    here = [x for x in flat if isinstance(x, OnToy)]
    moving = func is aten._to_copy.default
    if any(x.offloaded for x in here) and not moving:
        raise RuntimeError(f"{func}: the tensor is not on {NAME} now")
    others = [x for x in flat if isinstance(x, torch.Tensor) and not isinstance(x, OnToy)]
    # As on a GPU, scalars may be on any device.
    if func not in COPIES and here and any(other.ndim for other in others):
        raise RuntimeError(f"{func}: tensors on {NAME} and on the CPU in one operation")
    bare, named = tree_unflatten([x.value if isinstance(x, OnToy) else x for x in flat], spec)
    requested = named.get("device")
    inside = bool(here) if requested is None else torch.device(requested).type == NAME
    if inside and requested is not None:
        named["device"] = torch.device("cpu")
    result = func(*bare, **named)
    if func is aten.copy_.default:
        return args[0]
    if not inside or func in NUMBERS:
        return result
    known = {id(x.value): x for x in here}  # in-place operations return their input
    return tree_map_only(
        torch.Tensor, lambda x: known[id(x)] if id(x) in known else OnToy(x), result
    )


#: Registers a device written in Python; None: this version of torch cannot.
SETUP = getattr(backend_registration, "_setup_privateuseone_for_python_backend", None)


@cache
def _register() -> None:
    assert SETUP is not None
    SETUP(NAME, Backend())


@contextmanager
def toy() -> Iterator[torch.device]:
    """Context manager: makes the device available."""
    _register()
    with _Everywhere():
        yield torch.device(NAME, 0)
