"""The routed experts of a checkpoint in another storage format: what choosing it would cost."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from dsv4.core.formats import MXFP4, BlockScaledTensor
from dsv4.reference.quant import (
    dequantize,
    fp8_block_quantize,
    hadamard,
    mxfp4_quantize,
    mxfp4_to_nvfp4,
    nvfp4_global_scale,
    nvfp4_quantize,
)

Stored = Tensor | BlockScaledTensor
EXPERT_FORMATS = ("mxfp4", "nvfp4", "nvfp4_cast", "fp8")


def requantize_experts(
    weights: Mapping[str, Stored], format: str, is_rotated: bool = False
) -> dict[str, Stored]:
    """The same model with every routed expert rounded to `format`.

        W' = Q(W),   or W' = Q(W H) H with `is_rotated`

    weights     official name -> Tensor or BlockScaledTensor, as `Checkpoint.load` returns
    format      "mxfp4", "nvfp4", "fp8" (128 x 128): from the dequantised values; in NVFP4 w1 and
                w3 of an expert share the global scale. "nvfp4_cast": `mxfp4_to_nvfp4`, exact
    is_rotated  round W H, H the Hadamard matrix over the input columns, and rotate back. Weights
                that were stored in MXFP4 lie on its grid and lose nothing in it; W H lies on no
                grid, so the formats can be compared. Gives FP32 matrices
    ->          the mapping with the experts exchanged; everything else is passed on

    Raises ValueError for another format, for "nvfp4_cast" of experts that are not MXFP4 or rotated,
    and where the columns are no power of two and `is_rotated`.
    """
    if format not in EXPERT_FORMATS:
        raise ValueError(f"format: expected one of {EXPERT_FORMATS}, got {format!r}")
    if is_rotated and format == "nvfp4_cast":
        raise ValueError("format: expected one that rounds with is_rotated, got 'nvfp4_cast'")
    out = dict(weights)
    for name in weights:
        if ".experts." in name and name.endswith(".weight"):
            twin = weights[_twin(name)]
            if format == "nvfp4_cast":
                out[name] = mxfp4_to_nvfp4(_mxfp4(name, weights[name]), _mxfp4(name, twin))
            else:
                out[name] = _rounded(weights[name], twin, format, is_rotated)
    return out


def _rounded(stored: Stored, twin: Stored, format: str, is_rotated: bool) -> Stored:
    turn: Callable[[Tensor], Tensor] = hadamard if is_rotated else lambda w: w
    w = turn(_values(stored))
    if format == "mxfp4":
        rounded = mxfp4_quantize(w)
    elif format == "nvfp4":
        rounded = nvfp4_quantize(w, nvfp4_global_scale(w, turn(_values(twin))))
    else:
        rounded = fp8_block_quantize(w)
    return hadamard(dequantize(rounded)) if is_rotated else rounded


def _twin(name: str) -> str:
    """w1 and w3 are one another's twin, w2 its own."""
    for one, other in ((".w1.", ".w3."), (".w3.", ".w1.")):
        if one in name:
            return name.replace(one, other)
    return name


def _values(stored: Stored) -> Tensor:
    if isinstance(stored, BlockScaledTensor):
        return dequantize(stored)
    return stored.to(torch.float32)


def _mxfp4(name: str, stored: Stored) -> BlockScaledTensor:
    if not isinstance(stored, BlockScaledTensor) or stored.format is not MXFP4:
        got = stored.format.name if isinstance(stored, BlockScaledTensor) else stored.dtype
        raise ValueError(f"{name}: expected mxfp4 to cast without rounding, got {got}")
    return stored
