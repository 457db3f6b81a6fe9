"""Programmatic dependent launch: a kernel starts while the one before it still runs.

A kernel launched with `PDL` may only touch what the kernel before it writes, and may only write,
after `wait_for_previous`. Every program must wait, also one that returns early: the kernel after
it takes "this kernel is done" for "all before it are done". The first kernel of an op is launched
without `PDL`, so whatever came before the op is done when any of the op's kernels run.
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
