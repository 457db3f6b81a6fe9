"""Oracles of fused ops: each is the other oracles in a row, with the roundings between them.

Letters: T token rows, D dims, H heads of C dims, R of them rotated, W rows of a window ring.

    cos, sin  [S, R/2] FP32; row p is for position p
    position  [T] int64
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from dsv4.core.formats import FP8_BLOCK128, NVFP4, BlockScaledTensor
from dsv4.reference.cache_writes import kv_window_append
from dsv4.reference.kv_records import kv_record_pack, kv_record_unpack
from dsv4.reference.norm import rms_norm, rms_norm_unweighted
from dsv4.reference.precision import wide_dtype
from dsv4.reference.quant import (
    FP4_MAX,
    NVFP4_SCALE_MIN,
    dequantize,
    e2m1_encode,
    e4m3_round,
    fp8_act_quantize,
    mxfp4_act_quantize,
    nvfp4_global_scale,
    pack_nibbles,
)
from dsv4.reference.rope import apply_rope

ActivationForm = Literal["fp8", "mxfp4", "nvfp4"]


def rms_norm_quant(
    x: Tensor, weight: Tensor, eps: float, form: ActivationForm,
    global_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """RMSNorm, then the cast of a linear layer's input.

    x       [..., D]
    weight  [D]
    form    "fp8": E4M3 and UE8M0 a 128 dims; "mxfp4": e2m1 and UE8M0 a 32; "nvfp4": e2m1 and E4M3
            a 16 under `global_scale`, an FP32 scalar that only this form takes
    ->      values, scales
    """
    y = rms_norm(x, weight, eps)
    if form == "fp8":
        return fp8_act_quantize(y)
    if form == "mxfp4":
        return mxfp4_act_quantize(y)
    assert global_scale is not None
    return nvfp4_act_quantize(y, global_scale)[:2]


def q_norm_rope(q: Tensor, cos: Tensor, sin: Tensor, position: Tensor, eps: float) -> Tensor:
    """Normalise every query head without a weight, then rotate its last R dims.

    q  [T, H, C]  ->  [T, H, C]
    """
    return apply_rope(rms_norm_unweighted(q, eps), *_angles(cos, sin, position, q.dtype))


def kv_norm_rope_quant_insert(
    kv: Tensor, norm: Tensor, cos: Tensor, sin: Tensor, window: Tensor, slot: Tensor,
    position: Tensor, end_position: Tensor, rows: int, eps: float,
) -> Tensor:  # fmt: skip
    """Norm, RoPE and FP8 record of new window KV; token p goes to row p mod `rows` of its ring.

    kv      [T, C]
    norm    [C] weight of the RMSNorm
    window  [slots, stride] uint8, changed: a page of `rows` records for each slot
    slot    [T] int64, -1 for padding, which writes nothing
    end_position  [T] int64 length of the request after the step, without draft tokens that were
                  rejected: rows at or beyond it are not written, and of a longer chunk than the
                  ring only the last `rows` tokens before it
    ->      [T, C] in kv's dtype: every row as its record reads back, for the attention of the step
    """
    x = apply_rope(rms_norm(kv, norm, eps), *_angles(cos, sin, position, kv.dtype))
    rope_dim = 2 * cos.shape[1]
    kv_window_append(x, window, slot, position, end_position, rows, rope_dim)
    return kv_record_unpack(kv_record_pack(x, rope_dim), x.dtype, rope_dim)


def q_kv_norm_rope_insert(
    q: Tensor, kv: Tensor, norm: Tensor, cos: Tensor, sin: Tensor, window: Tensor, slot: Tensor,
    position: Tensor, end_position: Tensor, rows: int, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`q_norm_rope` and `kv_norm_rope_quant_insert` -> q [T, H, C], kv [T, C]

    Both results hold every row, those that the ring does not take too.
    """
    rest = norm, cos, sin, window, slot, position, end_position, rows, eps
    return q_norm_rope(q, cos, sin, position, eps), kv_norm_rope_quant_insert(kv, *rest)


def inverse_rope(o: Tensor, cos: Tensor, sin: Tensor, position: Tensor) -> None:
    """Rotate the last R dims of every head of the attention output back.

    o  [T, H, C], changed
    """
    o.copy_(apply_rope(o, *_angles(cos, sin, position, o.dtype), inverse=True))


def inverse_rope_quant(
    o: Tensor, cos: Tensor, sin: Tensor, position: Tensor, group: int = 128
) -> tuple[Tensor, Tensor]:
    """The inverse rotation of the attention output, then FP8 with a UE8M0 scale a `group` dims.

    o  [T, H, C]  ->  float8_e4m3fn [T, H, C],  float8_e8m0fnu [T, H, C/group]

    Serving engines quantise the input of wo_a; the official code does not.
    """
    y = apply_rope(o, *_angles(cos, sin, position, o.dtype), inverse=True)
    return fp8_act_quantize(y, group)


def nvfp4_act_quantize(
    x: Tensor, global_scale: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantise along the last dim to NVFP4.

        scale = e4m3(amax_block / (6 * global)),   value = e2m1(x / (scale * global))

    x             [..., K], K a multiple of 16
    global_scale  FP32 scalar; amax(x) / 2688 unless given, and 1 for zeros or nothing
    ->            uint8 [..., K/2], low nibble first,  float8_e4m3fn [..., K/16],  the global scale

    `quant.nvfp4_quantize` for tensors that may hold anything: a block with NaN gets a NaN scale.
    """
    if global_scale is not None:
        share = global_scale.clone()
    else:
        share = nvfp4_global_scale(x) if x.numel() else x.new_ones((), dtype=torch.float32)
    blocks = x.to(torch.float32).unflatten(-1, (-1, NVFP4.block[1]))
    ratio = blocks.abs().amax(dim=-1) / (FP4_MAX * share)
    scale = e4m3_round(ratio.clamp(min=NVFP4_SCALE_MIN))
    code = e2m1_encode(blocks / (scale.to(torch.float32) * share)[..., None]).flatten(-2)
    return pack_nibbles(code), scale, share


def nvfp4_act_dequantize(
    packed: Tensor, scale: Tensor, global_scale: Tensor, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Inverse of `nvfp4_act_quantize`: uint8 [..., K/2] and its scales -> `dtype` [..., K]."""
    t = BlockScaledTensor(NVFP4, packed.flatten(0, -2), scale.flatten(0, -2), global_scale)
    return dequantize(t, dtype).view(*packed.shape[:-1], 2 * packed.shape[-1])


def fp8_block_dequantize(data: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Inverse of `quant.fp8_block_quantize`: float8_e4m3fn [N, K], one scale per 128 x 128.

    scale  float8_e8m0fnu or float32 [ceil(N/128), ceil(K/128)]
    """
    return dequantize(BlockScaledTensor(FP8_BLOCK128, data, scale), dtype)


def _angles(
    cos: Tensor, sin: Tensor, position: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    rows = (table[position].to(wide_dtype(dtype)) for table in (cos, sin))
    return next(rows), next(rows)
