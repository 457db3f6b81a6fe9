"""Value checks: what a tensor of a sound checkpoint cannot hold."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from dsv4.core.config import ModelConfig
from dsv4.core.errors import CheckpointProblem
from dsv4.loader.match import Source

_FIX = "the shard is damaged: download it again"
_E8M0_NAN, _E8M0_MAX = 255, 127 + 40  # a byte b means 2^(b - 127)
_E4M3_NAN, _E4M3_MINUS_ZERO = 0x7F, 0x80
_F32_SCALE_MIN, _F32_SCALE_MAX = 2.0**-40, 2.0**40


def value_problems(source: Source, x: Tensor, config: ModelConfig) -> list[CheckpointProblem]:
    """Problems of scales and of tid2eid: checked on every load.

    E8M0 scales: not 0xFF (NaN) and at most 2^40; there is no lower limit, because quantisers
    floor the scale of an all-zero block near 2^-126. F32 scales: positive, within 2^-40..2^40.
    NVFP4: E4M3 scales not NaN and not negative, scalars finite and positive.
    """
    spec = source.spec
    if spec.name.endswith(".tid2eid"):
        return [_value(source, d) for d in _route_details(x, config.n_routed_experts)]
    if spec.name == spec.parameter:
        return []
    check = {"F8_E8M0": _e8m0_details, "F8_E4M3": _e4m3_scale_details}.get(spec.dtype)
    if check is None:
        check = _scalar_details if x.dim() == 0 else _f32_scale_details
    return [_value(source, d, kind="scale") for d in check(x)]


def deep_problems(source: Source, x: Tensor) -> list[CheckpointProblem]:
    """NaN and Inf in plain tensors, NaN in FP8 payloads. FP4 codes are all finite."""
    spec = source.spec
    if spec.name != spec.parameter or not x.is_floating_point():
        return []
    if spec.dtype == "F8_E4M3":
        num_bad = int(((x.view(torch.uint8) & 0x7F) == _E4M3_NAN).sum())
        what = "NaN"
    else:
        num_bad = x.numel() - int(x.isfinite().sum())
        what = "NaN or Inf"
    return [_value(source, f"{num_bad} of {x.numel()} values are {what}")] if num_bad else []


def _value(source: Source, detail: str, kind: str = "value") -> CheckpointProblem:
    return CheckpointProblem(kind, source.stored.file, source.spec.name, detail, _FIX)


def _count(mask: Tensor, x: Tensor) -> str:
    return f"{int(mask.sum())} of {x.numel()} scales are"


def _e8m0_details(x: Tensor) -> Iterator[str]:
    b = x.view(torch.uint8)
    if int(b.max()) <= _E8M0_MAX:  # one pass over sound data
        return
    is_nan = b == _E8M0_NAN
    is_huge = (b > _E8M0_MAX) & ~is_nan
    if is_nan.any():
        yield f"{_count(is_nan, b)} 0xFF (NaN in E8M0)"
    if is_huge.any():
        yield f"{_count(is_huge, b)} above 2^40"


def _e4m3_scale_details(x: Tensor) -> Iterator[str]:
    b = x.view(torch.uint8)
    if int(b.max()) < _E4M3_NAN:
        return
    is_nan = (b & 0x7F) == _E4M3_NAN
    is_negative = (b > _E4M3_MINUS_ZERO) & ~is_nan
    if is_nan.any():
        yield f"{_count(is_nan, b)} NaN"
    if is_negative.any():
        yield f"{_count(is_negative, b)} negative"


def _f32_scale_details(x: Tensor) -> Iterator[str]:
    bad = ~((x >= _F32_SCALE_MIN) & (x <= _F32_SCALE_MAX))  # NaN fails both
    if bad.any():
        yield f"{_count(bad, x)} outside 2^-40..2^40 (NaN, zero and negative included)"


def _scalar_details(x: Tensor) -> Iterator[str]:
    value = float(x)
    if not 0 < value < float("inf"):
        yield f"expected a finite positive scalar, got {value}"


def _route_details(ids: Tensor, num_experts: int) -> Iterator[str]:
    """tid2eid [V, K]: ids in [0, E), K distinct ones per row."""
    is_outside = ((ids < 0) | (ids >= num_experts)).any(dim=1)
    if is_outside.any():
        yield f"{_rows(is_outside)}: expert id outside 0..{num_experts - 1}"
    ranked = ids.sort(dim=1).values
    has_twin = (ranked[:, 1:] == ranked[:, :-1]).any(dim=1)
    if has_twin.any():
        yield f"{_rows(has_twin)}: the same expert twice"


def _rows(mask: Tensor) -> str:
    return f"{int(mask.sum())} of {mask.numel()} rows, first {int(mask.int().argmax())}"
