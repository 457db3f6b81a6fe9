"""Named activations: `tap("layers.3.attn.q", q)` is a no-op unless a capture is on.

The names are a documented contract (docs/taps.md): dumps of different tiers are compared by name.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from fnmatch import fnmatchcase

import torch
from torch import Tensor


class Capture:
    """Collects the tensors whose names match one of the globs, call by call."""

    def __init__(self, globs: Iterable[str]) -> None:
        self.globs = tuple(globs)
        self._parts: dict[str, list[Tensor]] = {}

    def add(self, name: str, x: Tensor) -> None:
        """Keep a copy of `x` if `name` is wanted."""
        if any(fnmatchcase(name, glob) for glob in self.globs):
            self._parts.setdefault(name, []).append(x.detach().clone())

    def tensors(self) -> dict[str, Tensor]:
        """The captured tensors; those of several forward calls are joined over dim 0.

        A matrix whose second dim grew from call to call (index scores, top-k lists) is padded on
        the right to the widest call: with -inf where it is floating point, with -1 otherwise.
        """
        return {name: _join(parts) for name, parts in self._parts.items()}


_ACTIVE: ContextVar[Capture | None] = ContextVar("dsv4_capture", default=None)


def _join(parts: list[Tensor]) -> Tensor:
    if len(parts) == 1:
        return parts[0]
    if parts[0].dim() == 2:
        width = max(p.shape[1] for p in parts)
        fill = float("-inf") if parts[0].is_floating_point() else -1
        parts = [torch.nn.functional.pad(p, (0, width - p.shape[1]), value=fill) for p in parts]
    return torch.cat(parts)


def tap(name: str, x: Tensor) -> None:
    """Offer `x` [T, ...] to the running capture, if there is one."""
    active = _ACTIVE.get()
    if active is not None:
        active.add(name, x)


def is_capturing() -> bool:
    """Whether a capture is on. A replayed CUDA graph would not be seen by it."""
    return _ACTIVE.get() is not None


@contextmanager
def capture(globs: Iterable[str] = ("*",)) -> Iterator[Capture]:
    """Collect every tap whose name matches one of `globs` while the block runs."""
    collected = Capture(globs)
    token = _ACTIVE.set(collected)
    try:
        yield collected
    finally:
        _ACTIVE.reset(token)
