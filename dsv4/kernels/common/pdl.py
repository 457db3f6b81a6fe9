"""Programmatic dependent launch: a kernel starts while the ones before it still run.

A kernel launched with `PDL` says two things. `let_next_start`, first of all, so that the kernel
after it is set up meanwhile and asks for its weights. `wait_for_previous`, in every program, also
in one that returns early: it returns when the kernel before is done, and as that one has waited
too, when all before it are. Ahead of it a kernel may read what no kernel of a step writes, which is
weights, and may write nothing. Loads of anything else must not take the read-only path
(`ld.global.nc`, `__ldg`): others write it within the life of the kernel.

Two kinds wait before they let the next start, so that the next may ahead of its own wait also read
what was written before them. Behind `indexer_query_kernel`, `indexer_scores_topk` reads keys,
tables and positions; behind the routers, `moe_with_shared` reads the token.

A kernel launched normally starts when all before it are done, so it need not wait. The Triton
kernels of the slabs of mHC are, and let the next start; those of torch do neither.
tests/kernels/test_overlap.py holds all this for Triton, tools/aot.py the wait for CUDA C++.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from dsv4.kernels.common.launch import INTERPRETED

PDL = {} if INTERPRETED else {"launch_pdl": True}
_ON_DEVICE = tl.constexpr(not INTERPRETED)


@triton.jit
def wait_for_previous():
    """Return when the kernel before this one is done and its writes are seen."""
    if _ON_DEVICE:
        gdc_wait()


@triton.jit
def let_next_start():
    """Allow the next kernel to start once all programs of this one have said so."""
    if _ON_DEVICE:
        gdc_launch_dependents()
