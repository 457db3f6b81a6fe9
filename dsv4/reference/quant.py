"""Block-scaled casts in plain PyTorch, exact to the bit: FP8, MXFP4, NVFP4 and their simulations.

Every scale is found from the bits of an FP32 number, never with log2, and 4-bit values are rounded
by comparisons, so that no result depends on a math library, a device or a dtype of PyTorch.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import embedding, pad

from dsv4.core.formats import FP8_BLOCK128, MXFP4, NVFP4, BlockScaledFormat, BlockScaledTensor

FP8_MAX = 448.0  # largest float8_e4m3fn
FP4_MAX = 6.0  # largest e2m1
FP8_FLOOR = 1e-4  # on amax, not on the scale
FP4_FLOOR = 6.0 * 2.0**-126  # the smallest amax with a normal scale
E8M0_NAN = 255
NVFP4_SCALE_MIN = 2.0**-9  # smallest float8_e4m3fn above zero

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


def e8m0_scale(amax: Tensor, max_value: float, floor: float) -> Tensor:
    """Smallest power of two that brings a block into range.

        s = 2^ceil(log2(max(amax, floor) / max_value))

    amax [...] any float   largest magnitude of each block
    ->   [...] float8_e8m0fnu; NaN where amax is NaN or infinite

    The quotient is the FP32 product with the FP32 reciprocal, and the ceiling is taken from its
    bits: the exponent, plus one when the mantissa is not zero. Kernels do the same.
    """
    quotient = amax.to(torch.float32).clamp(min=floor) * (1.0 / max_value)
    bits = quotient.contiguous().view(torch.int32)
    exponent = (bits >> 23) + ((bits & 0x7FFFFF) != 0)
    return exponent.clamp(max=E8M0_NAN).to(torch.uint8).view(torch.float8_e8m0fnu)


def e8m0_decode(scale: Tensor) -> Tensor:
    """The value 2^(byte - 127) of a float8_e8m0fnu tensor in FP32; byte 255 is NaN.

    Byte 0, 2^-127, is a subnormal FP32 number, which casts are known to flush or to misread.
    """
    byte = scale.contiguous().view(torch.uint8).to(torch.int32)
    bits = torch.where(byte == 0, 0x400000, byte << 23)
    return torch.where(byte == E8M0_NAN, 0x7FC00000, bits).to(torch.int32).view(torch.float32)


def e4m3_round(x: Tensor) -> Tensor:
    """Round to float8_e4m3fn: to nearest, ties to even, saturating at 448. NaN stays NaN."""
    return x.to(torch.float32).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)


def e2m1_encode(x: Tensor) -> Tensor:
    """Round to the 4-bit codes of e2m1: to nearest, ties to the even code, saturating at 6.

    x [...]  ->  uint8 [...], bit 3 the sign, bits 0-2 an index into 0, 0.5, 1, 1.5, 2, 3, 4, 6

    Ties: 0.25 to 0, 0.75 to 1, 1.25 to 1, 1.75 to 2, 2.5 to 2, 3.5 to 4, 5 to 4. The format has no
    NaN: the code of one is 0, and its scale has to carry it.
    """
    a = x.abs()
    code = torch.zeros_like(a, dtype=torch.uint8)
    for below, inclusive in (
        (0.25, False), (0.75, True), (1.25, False), (1.75, True), (2.5, False), (3.5, True),
        (5.0, False),
    ):  # fmt: skip
        code = code + (a >= below if inclusive else a > below)
    return code + 8 * torch.signbit(x).to(torch.uint8)


def e2m1_decode(code: Tensor) -> Tensor:
    """The FP32 value of 4-bit codes, uint8 [...] with values 0 to 15."""
    table = torch.tensor(_E2M1, dtype=torch.float32, device=code.device)
    return embedding(code.to(torch.int32), table[:, None]).squeeze(-1)


def pack_nibbles(code: Tensor) -> Tensor:
    """Two codes a byte, the even element in the low nibble: uint8 [..., K] -> uint8 [..., K/2]."""
    return code[..., 0::2] | (code[..., 1::2] << 4)


def unpack_nibbles(packed: Tensor) -> Tensor:
    """Inverse of `pack_nibbles`; takes int8 as well, the dtype of MXFP4 in checkpoints."""
    byte = packed.contiguous().view(torch.uint8)
    return torch.stack((byte & 0xF, byte >> 4), dim=-1).flatten(-2)


def hadamard(x: Tensor) -> Tensor:
    """Multiply by the Sylvester-Hadamard matrix of natural order, scaled to be orthogonal.

    x [..., n]  ->  [..., n] in the dtype of x;  n a power of two

    Works in FP32, or FP64 for FP64 input, and rounds once. Raises ValueError for another n.
    """
    n = x.shape[-1]
    if n < 1 or n & (n - 1):
        raise ValueError(f"x: expected a last dim that is a power of two, got {n}")
    y = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    half = 1
    while half < n:
        pair = y.unflatten(-1, (-1, 2, half))
        even, odd = pair[..., 0, :], pair[..., 1, :]
        y = torch.stack((even + odd, even - odd), dim=-2).flatten(-3)
        half *= 2
    return (y * n**-0.5).to(x.dtype)


def fp8_act_quantize(x: Tensor, group: int = 128) -> tuple[Tensor, Tensor]:
    """Quantise activations along the last dim with one UE8M0 scale a group.

    x [..., K]  ->  float8_e4m3fn [..., K],  float8_e8m0fnu [..., K/group]

    A group that holds NaN or infinity gets the NaN scale. FP64 input is rounded to FP32 first.
    Raises ValueError when `group` does not divide K.
    """
    blocks = _groups(x, group)
    scale = e8m0_scale(_amax(blocks), FP8_MAX, FP8_FLOOR)
    return e4m3_round(blocks / e8m0_decode(scale)[..., None]).flatten(-2), scale


def fp8_act_dequantize(data: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Inverse of `fp8_act_quantize`: float8_e4m3fn [..., K] and its scales -> `dtype` [..., K]."""
    group = data.shape[-1] // scale.shape[-1]
    value = data.to(torch.float32).unflatten(-1, (-1, group))
    return (value * e8m0_decode(scale)[..., None]).flatten(-2).to(dtype)


def simulate_fp8(x: Tensor, group: int) -> Tensor:
    """Round to what FP8 with a UE8M0 scale a `group` can hold: quantise and dequantise.

    x [..., K]  ->  [..., K] in the dtype of x. A result has 4 significant bits: exact in BF16.
    """
    return fp8_act_dequantize(*fp8_act_quantize(x, group), x.dtype)


def simulate_index_fp8(x: Tensor) -> Tensor:
    """The FP8 form of indexer queries and keys: one power-of-two FP32 scale a row, amax floor 1e-4.

    x [..., J]  ->  [..., J] in the dtype of x
    """
    return simulate_fp8(x, x.shape[-1])


def mxfp4_act_quantize(x: Tensor, group: int = 32) -> tuple[Tensor, Tensor]:
    """Quantise along the last dim to packed e2m1 with one UE8M0 scale a group.

    x [..., K]  ->  uint8 [..., K/2], low nibble first,  float8_e8m0fnu [..., K/group]
    """
    blocks = _groups(x, group)
    scale = e8m0_scale(_amax(blocks), FP4_MAX, FP4_FLOOR)
    code = e2m1_encode(blocks / e8m0_decode(scale)[..., None]).flatten(-2)
    return pack_nibbles(code), scale


def mxfp4_act_dequantize(
    packed: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Inverse of `mxfp4_act_quantize`: uint8 [..., K/2] and its scales -> `dtype` [..., K]."""
    value = e2m1_decode(unpack_nibbles(packed))
    blocks = value.unflatten(-1, (-1, value.shape[-1] // scale.shape[-1]))
    return (blocks * e8m0_decode(scale)[..., None]).flatten(-2).to(dtype)


def simulate_mxfp4(x: Tensor, group: int = 32) -> Tensor:
    """Round to what MXFP4 can hold: quantise and dequantise.

    x [..., K]  ->  [..., K] in the dtype of x
    """
    return mxfp4_act_dequantize(*mxfp4_act_quantize(x, group), x.dtype)


def simulate_nvfp4(x: Tensor, group: int = 16) -> Tensor:
    """Round to what NVFP4 can hold, with a global scale for each row: quantise and dequantise.

        global = amax(row) / (6 * 448),   scale = e4m3(amax_group / (6 * global)),
        value = e2m1(x / (scale * global)) * scale * global

    x [..., K]  ->  [..., K] in the dtype of x

    Each row is `nvfp4_quantize` of that row alone, so no row depends on another. A row that holds
    NaN or infinity becomes NaN. Raises ValueError when `group` does not divide K.
    """
    blocks = _groups(x, group)
    share = _nvfp4_share(x.abs().amax(dim=-1).to(torch.float32))[..., None]
    scale = e4m3_round((_amax(blocks) / (FP4_MAX * share)).clamp(min=NVFP4_SCALE_MIN))
    scale = scale.to(torch.float32)[..., None]
    share = share[..., None]
    value = e2m1_decode(e2m1_encode(blocks / (scale * share)))
    return (value * scale * share).flatten(-2).to(x.dtype)


def fp8_block_quantize(w: Tensor) -> BlockScaledTensor:
    """Quantise a weight [N, K] to FP8 with one UE8M0 scale per 128 x 128, smaller at the edges."""
    _check_weight(w)
    rows, cols = FP8_BLOCK128.block
    N, K = w.shape
    padded = pad(w.to(torch.float32), (0, -K % cols, 0, -N % rows))
    tiles = padded.unflatten(1, (-1, cols)).unflatten(0, (-1, rows))
    scale = e8m0_scale(tiles.abs().amax(dim=(1, 3)), FP8_MAX, FP8_FLOOR)
    data = e4m3_round(w.to(torch.float32) / _spread(e8m0_decode(scale), FP8_BLOCK128, (N, K)))
    return BlockScaledTensor(FP8_BLOCK128, data, scale)


def mxfp4_quantize(w: Tensor) -> BlockScaledTensor:
    """Quantise a weight [N, K] to MXFP4; K a multiple of 32."""
    _check_weight(w)
    packed, scale = mxfp4_act_quantize(w, MXFP4.block[1])
    return BlockScaledTensor(MXFP4, packed.view(torch.int8), scale)


def nvfp4_quantize(
    w: Tensor, global_scale: Tensor | None = None, input_scale: Tensor | None = None
) -> BlockScaledTensor:
    """Quantise a weight [N, K] to NVFP4; K a multiple of 16.

        global = amax(w) / (6 * 448),   scale = e4m3(amax_block / (6 * global)),
        value = e2m1(w / (scale * global))

    global_scale  FP32 scalar that w1 and w3 of an expert share, max(amax(w1), amax(w3)) / 2688
    input_scale   FP32 scalar of the activations, carried along

    A block whose scale would round to zero takes the smallest E4M3 number, 2^-9, instead.
    """
    _check_weight(w)
    blocks = _groups(w, NVFP4.block[1])
    share = nvfp4_global_scale(w) if global_scale is None else global_scale
    share = share.to(device=w.device, dtype=torch.float32).reshape(())
    if not (bool(share > 0) and bool(share.isfinite())):
        raise ValueError(f"global_scale: expected a positive finite number, got {share.item()}")
    ratio = _amax(blocks) / (FP4_MAX * share)
    scale = e4m3_round(ratio.clamp(min=NVFP4_SCALE_MIN))
    code = e2m1_encode(blocks / (scale.to(torch.float32) * share)[..., None]).flatten(-2)
    return BlockScaledTensor(NVFP4, pack_nibbles(code), scale, share, input_scale)


def nvfp4_global_scale(*weights: Tensor) -> Tensor:
    """The FP32 scale amax / 2688 that `weights` share; 1 when all of them are zero."""
    return _nvfp4_share(torch.stack([w.abs().amax().to(torch.float32) for w in weights]).amax())


def mxfp4_to_nvfp4(
    t: BlockScaledTensor,
    shared_with: BlockScaledTensor | None = None,
    input_scale: Tensor | None = None,
) -> BlockScaledTensor:
    """Cast MXFP4 to NVFP4 without changing a value (ModelOpt's lossless cast).

        global = 2^(kmax - 8),   scale = 2^(k - kmax + 8) for both halves of a group of 32

    k is the exponent of a group, kmax the largest in `t` and `shared_with` (w1 and w3 of one expert
    share it). Groups of zeros take part in neither. Raises ValueError when the exponents spread
    over more than 17, which E4M3 cannot hold, or when a scale is NaN.
    """
    tensors = [x for x in (t, shared_with) if x is not None]
    for x in tensors:
        _check_mxfp4(x)
    k, is_used = _exponents(t)
    used = torch.cat([e[u] for e, u in map(_exponents, tensors)])
    kmax = int(used.max()) if used.numel() else 0
    lowest = int(k[is_used].min()) if bool(is_used.any()) else kmax
    if kmax - lowest > 17:
        raise ValueError(
            f"t: expected scale exponents within 17 of the largest, {kmax}, got {lowest}; "
            "dequantize and use nvfp4_quantize, which rounds"
        )
    exponent = torch.where(is_used, k - kmax + 8, -9)
    scale = torch.ldexp(torch.ones_like(exponent, dtype=torch.float32), exponent)
    scale = scale.to(torch.float8_e4m3fn).repeat_interleave(2, dim=1)
    share = torch.tensor(2.0 ** (kmax - 8), dtype=torch.float32, device=t.data.device)
    return BlockScaledTensor(NVFP4, t.data.view(torch.uint8), scale, share, input_scale)


def dequantize(t: BlockScaledTensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The matrix [N, K] that `t` stands for.

    FP8 and MXFP4 with E8M0 scales are exact in FP32, FP64 and BF16. An FP32 scale, and the FP32
    global scale of NVFP4, leave one rounding in FP32 (a second one in BF16) and none in FP64.
    Raises ValueError for a payload or scale dtype the format does not have.
    """
    work = torch.float64 if dtype == torch.float64 else torch.float32
    if t.format is FP8_BLOCK128:
        if t.data.dtype != torch.float8_e4m3fn:
            raise ValueError(f"data: expected torch.float8_e4m3fn, got {t.data.dtype}")
        value = t.data.to(torch.float32).to(work)
    else:
        if t.data.dtype not in (torch.int8, torch.uint8):
            raise ValueError(f"data: expected torch.int8 or torch.uint8, got {t.data.dtype}")
        value = e2m1_decode(unpack_nibbles(t.data)).to(work)
    value = value * _spread(_scale_values(t).to(work), t.format, t.shape)
    if t.global_scale is not None:
        value = value * t.global_scale.to(work)
    return value.to(dtype)


def _scale_values(t: BlockScaledTensor) -> Tensor:
    """Block scales in FP32."""
    if t.scale.dtype == torch.float8_e8m0fnu and t.format is not NVFP4:
        return e8m0_decode(t.scale)
    if t.scale.dtype == torch.float8_e4m3fn and t.format is NVFP4:
        return t.scale.to(torch.float32)
    if t.scale.dtype == torch.float32 and t.format is FP8_BLOCK128:
        return t.scale
    raise ValueError(
        f"scale: expected {t.format.scale_dtype} for {t.format.name}, got {t.scale.dtype}"
    )


def _spread(scale: Tensor, fmt: BlockScaledFormat, shape: tuple[int, int]) -> Tensor:
    """Repeat block scales to one for each element of an [N, K] matrix."""
    rows, cols = fmt.block
    wide = scale.repeat_interleave(cols, dim=1)[:, : shape[1]]
    return wide if rows == 1 else wide.repeat_interleave(rows, dim=0)[: shape[0]]


def _groups(x: Tensor, group: int) -> Tensor:
    """[..., K] -> FP32 [..., K/group, group]."""
    if not x.is_floating_point():
        raise ValueError(f"x: expected a floating point tensor, got {x.dtype}")
    if x.dim() == 0 or group < 1 or x.shape[-1] % group:
        raise ValueError(f"x: expected a last dim divisible by {group}, got shape {list(x.shape)}")
    return x.to(torch.float32).unflatten(-1, (x.shape[-1] // group, group))


def _amax(blocks: Tensor) -> Tensor:
    return blocks.abs().amax(dim=-1)


def _nvfp4_share(amax: Tensor) -> Tensor:
    return torch.where(amax == 0, torch.ones_like(amax), amax / (FP4_MAX * FP8_MAX))


def _exponents(t: BlockScaledTensor) -> tuple[Tensor, Tensor]:
    """Scale exponents of an MXFP4 tensor as integers, and which groups hold anything but zeros."""
    k = t.scale.contiguous().view(torch.uint8).to(torch.int32) - 127
    nonzero = (t.data.contiguous().view(torch.uint8) & 0x77) != 0
    return k, nonzero.unflatten(1, (-1, MXFP4.block[1] // 2)).any(dim=-1)


def _check_mxfp4(t: BlockScaledTensor) -> None:
    if t.format is not MXFP4 or t.scale.dtype != torch.float8_e8m0fnu:
        raise ValueError(
            f"t: expected mxfp4 with E8M0 scales, got {t.format.name}, {t.scale.dtype}"
        )
    if bool((t.scale.contiguous().view(torch.uint8) == E8M0_NAN).any()):
        raise ValueError("t: expected finite scales, got NaN (byte 255)")


def _check_weight(w: Tensor) -> None:
    if w.dim() != 2 or not w.is_floating_point():
        raise ValueError(f"w: expected a float matrix [N, K], got {w.dtype} {list(w.shape)}")
    if not bool(w.isfinite().all()):
        raise ValueError("w: expected finite weights, got NaN or infinity")
