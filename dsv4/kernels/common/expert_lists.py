"""Counting sort of (token, k) rows by expert, and the blocks of a grouped product. Triton, SM 9 on.

Launched by the op moe_align and by kernels that need the lists for themselves.

Up to CHUNK rows in one launch; beyond that two before it count the rows of each chunk and add the
counts up. Within a chunk expert and index are sorted as one integer, so equal experts keep their
order and no atomic decides anything.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4.core.checks import check_tensors
from dsv4.kernels.common.checks import check_int
from dsv4.kernels.common.pdl import PDL, let_next_start, wait_for_previous

CONFIG = {"num_warps": 4}
CHUNK = 512  # 1024 took 1.7 times as long at 1024 tokens (H200), the sort most of it


@triton.jit
def load_bins(experts_ptr, at, N, first, NUM: tl.constexpr):
    """Local expert of rows `at`; NUM for an expert that is not here, NUM + 1 past the end."""
    local = tl.load(experts_ptr + at, at < N, -1) - first
    return tl.where(at < N, tl.where((local >= 0) & (local < NUM), local, NUM), NUM + 1)


@triton.jit(do_not_specialize=["N"])
def moe_align_count_kernel(
    experts_ptr, counts_ptr, N, first,
    NUM: tl.constexpr, BINS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    let_next_start()
    wait_for_previous()
    c = tl.program_id(0)
    bins = load_bins(experts_ptr, c * CHUNK + tl.arange(0, CHUNK), N, first, NUM)
    tl.store(counts_ptr + c * BINS + tl.arange(0, BINS), tl.histogram(bins, BINS))


@triton.jit(do_not_specialize=["num_chunks"])
def moe_align_scan_kernel(
    counts_ptr, num_chunks, BINS: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr
):
    """Counts of a chunk become those of all chunks before it; a last row gets the totals."""
    let_next_start()
    wait_for_previous()
    b = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([COLUMNS], tl.int32)
    for start in range(0, num_chunks, ROWS):
        row = start + tl.arange(0, ROWS)[:, None]
        at = counts_ptr + row * BINS + b[None, :]
        counts = tl.load(at, row < num_chunks, 0)
        tl.store(at, total[None, :] + tl.cumsum(counts, axis=0) - counts, row < num_chunks)
        total += tl.sum(counts, axis=0)
    tl.store(counts_ptr + num_chunks * BINS + b, total)


@triton.jit(do_not_specialize=["N", "num_chunks", "capacity"])
def moe_align_kernel(
    experts_ptr, counts_ptr, rows_ptr, offsets_ptr, block_expert_ptr, block_start_ptr,
    num_blocks_ptr, N, first, num_chunks, block_size, capacity,
    NUM: tl.constexpr, BINS: tl.constexpr, CHUNK: tl.constexpr, BLOCKS: tl.constexpr,
    IS_ONE: tl.constexpr,
):  # fmt: skip
    let_next_start()
    wait_for_previous()
    c = tl.program_id(0)
    i, b = tl.arange(0, CHUNK), tl.arange(0, BINS)
    bins = load_bins(experts_ptr, c * CHUNK + i, N, first, NUM)
    own = tl.histogram(bins, BINS)
    if IS_ONE:
        total = own
    else:
        total = tl.load(counts_ptr + num_chunks * BINS + b)
        before = tl.load(counts_ptr + c * BINS + b)
    blocks = tl.where(b < NUM, (total + block_size - 1) // block_size, 0)
    # One scan for both: rows in the low half, blocks in the high one.
    both = tl.cumsum((blocks.to(tl.int64) << 32) | total.to(tl.int64), axis=0)
    place = (both & 0xFFFFFFFF).to(tl.int32) - total  # of each bin's first row
    ordered = tl.sort(bins * CHUNK + i)
    bins, to = ordered // CHUNK, i
    if not IS_ONE:
        to += tl.gather(place + before - (tl.cumsum(own, axis=0) - own), bins, 0)
    row = tl.where(bins < NUM, c * CHUNK + ordered % CHUNK, -1)
    tl.store(rows_ptr + to, row, bins <= NUM)

    first_block, num_blocks = (both >> 32).to(tl.int32) - blocks, tl.sum(blocks, axis=0)
    mine = tl.where(b % num_chunks == c, blocks, 0)
    for n in range(0, tl.max(mine, axis=0)):
        tl.store(block_expert_ptr + first_block + n, b, n < mine)
        tl.store(block_start_ptr + first_block + n, place + n * block_size, n < mine)
    index = c * BLOCKS + tl.arange(0, BLOCKS)
    is_spare = (index >= num_blocks) & (index < capacity)
    nothing = tl.full([BLOCKS], -1, tl.int32)
    tl.store(block_expert_ptr + index, nothing, is_spare)
    tl.store(block_start_ptr + index, nothing, is_spare)
    if c == 0:
        tl.store(offsets_ptr + b, place, b <= NUM)
        tl.store(num_blocks_ptr, num_blocks)


def moe_align_capacity(num_rows: int, num_experts: int, block_size: int) -> int:
    """As dsv4.reference.routing.moe_align_capacity."""
    experts = min(num_experts, num_rows)
    return min(num_rows, (num_rows + experts * (block_size - 1)) // block_size)


def _check_sizes(first_expert: int, num_experts: int, block_size: int) -> None:
    check_int("first_expert", first_expert, low=0)
    check_int("num_experts", num_experts)
    check_int("block_size", block_size)


def outputs(
    experts: Tensor, first_expert: int, num_experts: int, block_size: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Allocate the five results and room for the counts of chunks."""
    _check_sizes(first_expert, num_experts, block_size)
    N = experts.numel()
    capacity = moe_align_capacity(N, num_experts, block_size)
    counts = (triton.cdiv(N, CHUNK) + 1) * triton.next_power_of_2(num_experts + 2)
    sizes = N, num_experts + 1, capacity, capacity, 1, counts if N > CHUNK else 0
    first, second, third, fourth, fifth, sixth = (
        experts.new_empty(n, dtype=torch.int32) for n in sizes
    )
    return first, second, third, fourth, fifth, sixth


def launch(
    experts: Tensor, first_expert: int, num_experts: int, block_size: int,
    out: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor],
) -> None:  # fmt: skip
    """Fill `out`. Allocates nothing and reads nothing back, so a CUDA graph can hold it."""
    rows, offsets, block_expert, block_start, num_blocks, counts = out
    _check_sizes(first_expert, num_experts, block_size)
    N, bins = experts.numel(), triton.next_power_of_2(num_experts + 2)
    capacity = moe_align_capacity(N, num_experts, block_size)
    is_one = N <= CHUNK
    num_chunks = max(1, triton.cdiv(N, CHUNK))
    check_tensors(
        experts=(experts, "T K", torch.int32),
        rows=(rows, str(N), torch.int32),
        offsets=(offsets, str(num_experts + 1), torch.int32),
        block_expert=(block_expert, str(capacity), torch.int32),
        block_start=(block_start, str(capacity), torch.int32),
        num_blocks=(num_blocks, "1", torch.int32),
        counts=(counts, str(0 if is_one else (num_chunks + 1) * bins), torch.int32),
    )
    chunk = max(16, triton.next_power_of_2(N)) if is_one else CHUNK
    fixed = {"NUM": num_experts, "BINS": bins, "CHUNK": chunk}
    if not is_one:
        moe_align_count_kernel[(num_chunks,)](
            experts, counts, N, first_expert, **fixed, **CONFIG, **PDL
        )  # fmt: skip
        columns = min(16, bins)
        moe_align_scan_kernel[(bins // columns,)](
            counts, num_chunks, BINS=bins, COLUMNS=columns, ROWS=128, **CONFIG, **PDL
        )  # fmt: skip
    moe_align_kernel[(num_chunks,)](
        experts, counts, rows, offsets, block_expert, block_start, num_blocks, N, first_expert,
        num_chunks, block_size, capacity, **fixed,
        BLOCKS=triton.next_power_of_2(max(1, triton.cdiv(capacity, num_chunks))),
        IS_ONE=is_one, **CONFIG, **PDL,
    )  # fmt: skip
