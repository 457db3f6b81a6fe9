"""One output tile summed by several programs: partial sums in memory, added in a fixed order."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4.kernels.common.cuda import zeroed_counters


def arrival_counters(device: torch.device, num_tiles: int) -> Tensor:
    """Int32 [num_tiles], zero before and after every launch."""
    if device.type == "cuda":
        return zeroed_counters(device, num_tiles)
    return torch.zeros(num_tiles, dtype=torch.int32, device=device)


@triton.jit
def is_last_arrival(counter_ptr, num_arrivals):
    """Whether all others have arrived; what they stored before is then visible. Resets."""
    tl.debug_barrier()
    is_last = tl.atomic_add(counter_ptr, 1, sem="acq_rel") == num_arrivals - 1
    if is_last:
        tl.store(counter_ptr, 0)
    return is_last


@triton.jit
def sum_in_order(partial_ptr, offset, stride, num_parts):
    """Part 0 + part 1 + ... where part i lies at `partial_ptr + i * stride + offset`."""
    total = tl.load(partial_ptr + offset, cache_modifier=".cg")
    for i in tl.range(1, num_parts, num_stages=1):
        total += tl.load(partial_ptr + i * stride + offset, cache_modifier=".cg")
    return total
