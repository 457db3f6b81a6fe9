"""Comparisons that say what differs, where, and by how much."""

from __future__ import annotations

import torch
from torch import Tensor

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def relative_error(got: Tensor, want: Tensor) -> float:
    """Largest absolute difference over the largest magnitude of `want`, in FP64.

    NaN anywhere gives NaN, so that `relative_error(...) < limit` fails; two all-zero tensors give
    0, and any difference from an all-zero `want` infinity. Raises ValueError on unequal shapes.
    """
    if got.shape != want.shape:
        raise ValueError(f"got: expected shape {list(want.shape)}, got {list(got.shape)}")
    if want.numel() == 0:
        return 0.0
    got64, want64 = got.detach().to(torch.float64).cpu(), want.detach().to(torch.float64).cpu()
    error, size = (got64 - want64).abs().max().item(), want64.abs().max().item()
    if error == 0 or error != error:
        return error
    return error / size if size else float("inf")


def assert_as_exact_as(
    name: str, got: Tensor, same: Tensor, exact: Tensor, factor: float = 2.0
) -> None:
    """Allow `got` at most `factor` times the error that plain PyTorch makes in the same precision.

    got    what is tested
    same   the oracle run in the precision of `got`
    exact  the oracle run in FP64

    One unit in the last place of the largest value is allowed on top, for the case where `same`
    happens to be exact. NaN and infinity in `got` fail. Raises AssertionError with the index, the
    error and the limit.
    """
    for other, x in (("same", same), ("exact", exact)):
        if x.shape != got.shape:
            raise AssertionError(f"{name}: shape {list(got.shape)}, {other} has {list(x.shape)}")
    if got.numel() == 0:
        return
    truth = exact.detach().to(torch.float64)
    error = (got.detach().to(torch.float64) - truth).abs()
    last_place = torch.finfo(got.dtype).eps * truth.abs().max()
    limit = factor * (same.detach().to(torch.float64) - truth).abs().max() + last_place
    if not limit.isfinite():
        raise AssertionError(f"{name}: the oracle is not finite, so nothing can be compared")
    if not bool((error <= limit).all()):
        where = _index(error.nan_to_num(nan=torch.inf).argmax(), error)
        raise AssertionError(
            f"{name}{where}: error {error[tuple(where)]:.3e} exceeds {limit:.3e} "
            f"(got {got[tuple(where)].item()}, exact {truth[tuple(where)].item()})"
        )


def assert_bits_equal(name: str, got: Tensor, want: Tensor) -> None:
    """Require equal dtype, shape and bits: -0 differs from 0, a NaN equals only its own pattern.

    Raises AssertionError naming the first differing index and how many elements differ.
    """
    if got.dtype != want.dtype or got.shape != want.shape:
        raise AssertionError(
            f"{name}: expected {want.dtype} {list(want.shape)}, got {got.dtype} {list(got.shape)}"
        )
    differs = _as_bits(got) != _as_bits(want)
    if bool(differs.any()):
        where = _index(differs.to(torch.uint8).argmax(), differs)
        got_bits, want_bits = (_as_bits(x)[tuple(where)].item() for x in (got, want))
        raise AssertionError(
            f"{name}{where}: got {_value(got, where)} ({got_bits & _mask(got):#x}), "
            f"want {_value(want, where)} ({want_bits & _mask(want):#x}); "
            f"{int(differs.sum())} of {differs.numel()} elements differ"
        )


def _as_bits(x: Tensor) -> Tensor:
    return x.detach().cpu().contiguous().view(_BITS[x.element_size()])


def _mask(x: Tensor) -> int:
    return (1 << (8 * x.element_size())) - 1


def _value(x: Tensor, where: list[int]) -> float | int | bool:
    element = x.detach()[tuple(where)]
    return element.to(torch.float32).item() if x.is_floating_point() else element.item()


def _index(flat: Tensor, like: Tensor) -> list[int]:
    """The multi-dimensional index of flat position `flat`: the first one, as argmax gives it."""
    return [int(i) for i in torch.unravel_index(flat.cpu(), like.shape)]
