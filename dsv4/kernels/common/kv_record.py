"""KV records and index keys in a page, written and read by one program (dsv4.core.kv_layout).

A page is `num_rows` value parts and then as many scale parts; a ring of window rows is a page too.
"""

import triton
import triton.language as tl

from dsv4.kernels.common.bits import (
    bf16_bits,
    e2m1_value,
    e4m3_value,
    e8m0_value,
    fp8_groups,
    mxfp4_groups,
)

GROUP = tl.constexpr(64)  # nope dims that share a scale
MXFP4_GROUP = tl.constexpr(32)


@triton.jit
def store_kv_record(
    page_ptr, row, num_rows, x, C: tl.constexpr, R: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    """Write FP32 [BLOCK_C] as record `row`. One byte a store: nothing depends on alignment."""
    NOPE: tl.constexpr = C - R
    DATA: tl.constexpr = NOPE + 2 * R
    NUM_SCALES: tl.constexpr = NOPE // GROUP
    SCALE_BYTES: tl.constexpr = (NUM_SCALES + 7) // 8 * 8
    c = tl.arange(0, BLOCK_C)
    code, scale = fp8_groups(x, BLOCK_C, GROUP)
    data_ptr = page_ptr + row * DATA
    tl.store(data_ptr + c, code.to(tl.uint8), c < NOPE)
    bits, is_rope = bf16_bits(x), (c >= NOPE) & (c < C)
    rope_ptr = data_ptr + NOPE + 2 * (c - NOPE)
    tl.store(rope_ptr, (bits & 0xFF).to(tl.uint8), is_rope)
    tl.store(rope_ptr + 1, (bits >> 8).to(tl.uint8), is_rope)
    scale_ptr = page_ptr + num_rows * DATA + row * SCALE_BYTES
    g, pad = tl.arange(0, BLOCK_C // GROUP), SCALE_BYTES - 8 + tl.arange(0, 8)
    tl.store(scale_ptr + g, scale.to(tl.uint8), g < NUM_SCALES)
    tl.store(scale_ptr + pad, tl.zeros([8], tl.uint8), pad >= NUM_SCALES)


@triton.jit
def load_kv_record(
    page_ptr, row, num_rows, live, C: tl.constexpr, R: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    """Read record `row` as FP32 [BLOCK_C]; zeros, and no access, where `live` is false."""
    NOPE: tl.constexpr = C - R
    DATA: tl.constexpr = NOPE + 2 * R
    SCALE_BYTES: tl.constexpr = (NOPE // GROUP + 7) // 8 * 8
    c = tl.arange(0, BLOCK_C)
    # The interpreter takes no mask made of a scalar condition, but a bound made of one.
    end = tl.where(live, C, 0)
    is_nope, is_rope = (c < NOPE) & (c < end), (c >= NOPE) & (c < end)
    data_ptr = page_ptr + row * DATA
    code = tl.load(data_ptr + c, is_nope, 0).to(tl.int32)
    scale_ptr = page_ptr + num_rows * DATA + row * SCALE_BYTES
    scale = tl.load(scale_ptr + c // GROUP, is_nope, 127).to(tl.int32)
    rope_ptr = data_ptr + NOPE + 2 * (c - NOPE)
    low = tl.load(rope_ptr, is_rope, 0).to(tl.int32)
    high = tl.load(rope_ptr + 1, is_rope, 0).to(tl.int32)
    rope = ((low << 16) | (high << 24)).to(tl.float32, bitcast=True)
    return tl.where(is_rope, rope, e4m3_value(code) * e8m0_value(scale))


@triton.jit
def store_index_key(page_ptr, row, num_rows, x, J: tl.constexpr, MXFP4: tl.constexpr):
    """Write FP32 [J], J a power of two, as index key `row`."""
    if MXFP4:
        packed, scale = mxfp4_groups(x, J)
        value_ptr = page_ptr + row * (J // 2)
        scale_ptr = page_ptr + num_rows * (J // 2) + row * (J // MXFP4_GROUP)
        tl.store(value_ptr + tl.arange(0, J // 2), packed.to(tl.uint8))
        tl.store(scale_ptr + tl.arange(0, J // MXFP4_GROUP), scale.to(tl.uint8))
    else:
        code, scale = fp8_groups(x, J, J)
        tl.store(page_ptr + row * J + tl.arange(0, J), code.to(tl.uint8))
        # The one scale is an FP32 number, little endian.
        bits = tl.sum(e8m0_value(scale).to(tl.int32, bitcast=True), axis=0)
        i = tl.arange(0, 4)
        tl.store(page_ptr + num_rows * J + row * 4 + i, ((bits >> (8 * i)) & 0xFF).to(tl.uint8))


@triton.jit
def load_index_key(page_ptr, row, num_rows, live, J: tl.constexpr, MXFP4: tl.constexpr):
    """Read index key `row` as FP32 [J]; zeros, and no access, where `live` is false."""
    c = tl.arange(0, J)
    mask = c < tl.where(live, J, 0)
    if MXFP4:
        byte = tl.load(page_ptr + row * (J // 2) + c // 2, mask, 0).to(tl.int32)
        scale_ptr = page_ptr + num_rows * (J // 2) + row * (J // MXFP4_GROUP)
        scale = e8m0_value(tl.load(scale_ptr + c // MXFP4_GROUP, mask, 127).to(tl.int32))
        value = e2m1_value((byte >> (4 * (c & 1))) & 0xF)
    else:
        value = e4m3_value(tl.load(page_ptr + row * J + c, mask, 0).to(tl.int32))
        scale_ptr = page_ptr + num_rows * J + row * 4
        bits = tl.load(scale_ptr + c * 0, mask, 0).to(tl.int32)
        for i in tl.static_range(1, 4):
            bits |= tl.load(scale_ptr + c * 0 + i, mask, 0).to(tl.int32) << (8 * i)
        scale = bits.to(tl.float32, bitcast=True)
    return value * scale
