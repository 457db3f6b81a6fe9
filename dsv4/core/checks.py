"""Tensor contracts in one call: symbolic shapes, dtype, device, contiguity."""

from __future__ import annotations

from functools import cache

from torch import Tensor, dtype


@cache
def _parse(shape: str) -> tuple[int | str, ...]:
    return tuple(int(word) if word.isdigit() else word for word in shape.split())


def check_tensors(**specs: tuple[Tensor, str, dtype]) -> dict[str, int]:
    """Check each `name=(tensor, "T 24", dtype)`; return the sizes the letters took, {"T": 4096}.

    A number must match; a letter takes its size at first use and must agree from then on. All
    tensors must be contiguous and on one device. Raises ValueError naming the argument.
    """
    sizes: dict[str, int] = {}
    device = next(iter(specs.values()))[0].device
    for name, (x, shape, want_dtype) in specs.items():
        want = _parse(shape)
        agrees = x.dim() == len(want) and all(
            size == (sizes.setdefault(w, size) if isinstance(w, str) else w)
            for w, size in zip(want, x.shape, strict=True)
        )
        if not agrees:
            raise ValueError(f"{name}: expected shape [{shape}] with {sizes}, got {list(x.shape)}")
        if x.dtype != want_dtype:
            raise ValueError(f"{name}: expected {want_dtype}, got {x.dtype}")
        if x.device != device:
            raise ValueError(f"{name}: expected device {device}, got {x.device}")
        if not x.is_contiguous():
            raise ValueError(f"{name}: expected a contiguous tensor, got strides {x.stride()}")
    return sizes
