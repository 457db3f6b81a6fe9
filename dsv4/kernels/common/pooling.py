"""The softmax pooling of a compressor window, from rows of this step and from the state ring."""

import triton
import triton.language as tl


@triton.jit
def load_rows(
    rows_ptr, ring_ptr, position, first_row, first_position, channel, live,
    WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Rows of the tokens at `position` [n, 1]: this step's where it has them, else the ring's."""
    is_new = position >= first_position
    row = first_row + (position - first_position)
    new = tl.load(rows_ptr + row * WIDTH + channel, live & is_new, 0.0)
    is_old = live & (position < first_position)
    old = tl.load(ring_ptr + (position % ROWS) * WIDTH + channel, is_old, 0.0)
    return tl.where(is_new, new, old)


@triton.jit
def pool_window(
    kappa_ptr, gamma_ptr, ring_ptr, end, first_row, first_position,
    D: tl.constexpr, RATIO: tl.constexpr, OVERLAP: tl.constexpr, BLOCK_D: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """Entry of the window that ends before position `end`: softmax over tokens, each channel alone.

        v[i] = sum_p exp(gamma_p[i] - m[i]) kappa_p[i] / sum_p exp(gamma_p[i] - m[i])

    With OVERLAP the window before it takes part with the first half of the channels, this one with
    the second half. ring_ptr is the slot's kappa; its gamma follows. -> FP32 [BLOCK_D]

    The maximum is found first, in a pass of its own: no term is rescaled, and tiles are added in
    order, so the bits do not depend on where a row came from.
    """
    HALVES: tl.constexpr = 2 if OVERLAP else 1
    SLOTS: tl.constexpr = HALVES * RATIO
    WIDTH: tl.constexpr = HALVES * D
    c = tl.arange(0, BLOCK_D)[None, :]
    j = tl.arange(0, TILE)[:, None]
    gamma_ring_ptr = ring_ptr + SLOTS * WIDTH
    top = tl.full([BLOCK_D], float("-inf"), tl.float32)
    for start in range(0, SLOTS, TILE):
        position = end - SLOTS + start + j
        live = (position >= 0) & (c < D)
        channel = c + ((start + j) // RATIO) * D
        gamma = load_rows(
            gamma_ptr, gamma_ring_ptr, position, first_row, first_position, channel, live,
            WIDTH, SLOTS,
        )  # fmt: skip
        top = tl.maximum(top, tl.max(tl.where(live, gamma, float("-inf")), axis=0))
    is_channel = tl.arange(0, BLOCK_D) < D
    top = tl.where(is_channel, top, 0.0)
    total = tl.zeros([BLOCK_D], tl.float32)
    pooled = tl.zeros([BLOCK_D], tl.float32)
    for start in range(0, SLOTS, TILE):
        position = end - SLOTS + start + j
        live = (position >= 0) & (c < D)
        channel = c + ((start + j) // RATIO) * D
        gamma = load_rows(
            gamma_ptr, gamma_ring_ptr, position, first_row, first_position, channel, live,
            WIDTH, SLOTS,
        )  # fmt: skip
        kappa = load_rows(
            kappa_ptr, ring_ptr, position, first_row, first_position, channel, live, WIDTH, SLOTS
        )
        weight = tl.exp(tl.where(live, gamma, float("-inf")) - top[None, :])
        total += tl.sum(weight, axis=0)
        pooled += tl.sum(weight * kappa, axis=0)
    return tl.div_rn(pooled, tl.where(is_channel, total, 1.0))
