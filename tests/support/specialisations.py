"""Which binaries a run of kernels would need on a GPU, found on a CPU without running any.

Triton compiles a kernel once for each combination of its constants, its argument types, and of what
it assumes of them: an integer that is 1 or divisible by 16, a pointer aligned to 16 bytes.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

Binary = tuple[str, tuple[tuple[str, object], ...]]


@contextmanager
def binaries() -> Iterator[set[Binary]]:
    """Collects them; results of kernels are whatever memory held."""
    found: set[Binary] = set()

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        found.add(_binary(self, args, kwargs))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpretedFunction, "run", run)
        yield found


def _binary(kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Binary:
    parameters = inspect.signature(kernel.fn).parameters
    given = dict(zip(parameters, args, strict=False)) | kwargs
    general = kernel.kwargs.get("do_not_specialize") or ()
    own = {}
    for i, (name, value) in enumerate(given.items()):
        is_constant = name not in parameters or "constexpr" in str(parameters[name].annotation)
        is_general = name in general or i in general
        own[name] = value if is_constant else _assumed(value, is_general)
    return kernel.fn.__qualname__, tuple(own.items())


def _assumed(value: object, is_general: bool) -> object:
    if isinstance(value, Tensor):
        return str(value.dtype), value.data_ptr() % 16 == 0
    if value is None or isinstance(value, bool) or not isinstance(value, int):
        return type(value)
    width = 32 if -(1 << 31) <= value < 1 << 31 else 64
    return (width,) if is_general else (width, value == 1, value % 16 == 0)
