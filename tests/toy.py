"""An accelerator for tests: a device of its own, whose tensors live in this process's memory.

Like a GPU it refuses what mixes its tensors with those of the CPU; what it computes is what the CPU
computes, to the bit. So code that is to run on any device can be seen to do so without one.
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
#: What takes tensors from one device to another.
COPIES = (aten._to_copy.default, aten.copy_.default)
#: Results that are no tensors of the device.
NUMBERS = (aten._local_scalar_dense.default,)


class OnToy(torch.Tensor):
    """A tensor on the device; `value` holds its numbers."""

    value: torch.Tensor
    parked: bool

    @staticmethod
    def __new__(cls, value: torch.Tensor) -> OnToy:
        made = torch.Tensor._make_wrapper_subclass(
            cls, value.shape, strides=value.stride(), storage_offset=value.storage_offset(),
            dtype=value.dtype, device=torch.device(NAME, 0),
        )  # fmt: skip
        made.value, made.parked = value, False
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
        """Elsewhere from now on, or here again; it cannot be used meanwhile."""
        self.parked = not isinstance(value, OnToy)
        self.value = value.value if isinstance(value, OnToy) else value
        Backend.parked += self.parked

    def data_ptr(self) -> int:
        return self.value.data_ptr()

    def tolist(self) -> Any:
        return self.value.tolist()

    def numpy(self, *, force: bool = False) -> Any:
        raise TypeError(f"a tensor on {NAME} is no numpy array")


class _Everywhere(TorchDispatchMode):
    """Sees what makes tensors on the device, or brings them there, too."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _run(func, args, kwargs or {})


class Backend:
    """What torch asks a device about."""

    FREE, PEAK = 64 << 30, 123456
    waited = parked = 0

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
        Backend.waited += 1


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """An operation, on the numbers themselves; its results are on the device if it worked there."""
    flat, spec = tree_flatten((args, kwargs))
    here = [x for x in flat if isinstance(x, OnToy)]
    moving = func is aten._to_copy.default
    if any(x.parked for x in here) and not moving:
        raise RuntimeError(f"{func}: the tensor is not on {NAME} now")
    others = [x for x in flat if isinstance(x, torch.Tensor) and not isinstance(x, OnToy)]
    # As on a GPU, a number may come from anywhere.
    if func not in COPIES and here and any(other.ndim for other in others):
        raise RuntimeError(f"{func}: tensors on {NAME} and on the CPU in one operation")
    bare, named = tree_unflatten([x.value if isinstance(x, OnToy) else x for x in flat], spec)
    asked = named.get("device")
    inside = bool(here) if asked is None else torch.device(asked).type == NAME
    if inside and asked is not None:
        named["device"] = torch.device("cpu")
    found = func(*bare, **named)
    if func is aten.copy_.default:
        return args[0]
    if not inside or func in NUMBERS:
        return found
    known = {id(x.value): x for x in here}  # what worked in place returns what it was given
    return tree_map_only(
        torch.Tensor, lambda x: known[id(x)] if id(x) in known else OnToy(x), found
    )


#: Makes torch know a device that is written in Python; None: this torch cannot.
SETUP = getattr(backend_registration, "_setup_privateuseone_for_python_backend", None)


@cache
def _register() -> None:
    assert SETUP is not None
    SETUP(NAME, Backend())


@contextmanager
def toy() -> Iterator[torch.device]:
    """The device, which is there while the block runs."""
    _register()
    with _Everywhere():
        yield torch.device(NAME, 0)
