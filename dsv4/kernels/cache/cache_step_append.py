"""What a step leaves in a layer's rings, in one launch: window KV and compressor rows. Triton.

A program a token and ring, with the bodies of kv_window_append and compressor_state_append.
"""

import triton
import triton.language as tl
from torch import Tensor

from dsv4.core.dispatch import KernelSpec
from dsv4.kernels.cache import compressor_state_append, kv_window_append
from dsv4.kernels.cache.compressor_state_append import append_state_row
from dsv4.kernels.cache.kv_window_append import append_window_row
from dsv4.kernels.common.launch import EXACT, INTERPRETED
from dsv4.kernels.common.pdl import PDL, let_next_start, wait_for_previous

REFERENCE = "dsv4.reference.cache_writes:cache_step_append"
CONFIG = {"num_warps": 2}


@triton.jit
def cache_step_append_kernel(
    kv_ptr, window_ptr, kappa_ptr, gamma_ptr, state_ptr, kappa_2_ptr, gamma_2_ptr, state_2_ptr,
    slot_ptr, position_ptr, end_ptr, stride, rows,
    C: tl.constexpr, R: tl.constexpr, BLOCK_C: tl.constexpr, STATES: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    ROWS_2: tl.constexpr, WIDTH_2: tl.constexpr, BLOCK_2: tl.constexpr,
):  # fmt: skip
    let_next_start()
    wait_for_previous()
    t, ring = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if ring == 0:
        append_window_row(
            kv_ptr, window_ptr, slot_ptr, position_ptr, end_ptr, t, stride, rows, C, R, BLOCK_C
        )
    if STATES > 0:  # noqa: SIM102 (at compile time)
        if ring == 1:
            append_state_row(
                kappa_ptr, gamma_ptr, state_ptr, slot_ptr, position_ptr, end_ptr, t,
                ROWS, WIDTH, BLOCK,
            )  # fmt: skip
    if STATES > 1:  # noqa: SIM102
        if ring == 2:
            append_state_row(
                kappa_2_ptr, gamma_2_ptr, state_2_ptr, slot_ptr, position_ptr, end_ptr, t,
                ROWS_2, WIDTH_2, BLOCK_2,
            )  # fmt: skip


def launch(
    kv: Tensor, window: Tensor, kappa: Tensor | None, gamma: Tensor | None, state: Tensor | None,
    index_kappa: Tensor | None, index_gamma: Tensor | None, index_state: Tensor | None,
    slot: Tensor, position: Tensor, end_position: Tensor, rows: int, rope_dim: int,
) -> None:  # fmt: skip
    """Write the rows. Allocates nothing and reads nothing back, so a CUDA graph can hold it."""
    at = slot, position, end_position
    T, C, stride = kv_window_append.check(kv, window, *at, rows, rope_dim)
    groups = {"": (kappa, gamma, state), "index_": (index_kappa, index_gamma, index_state)}
    pointers, sizes = [], []
    for prefix, group in groups.items():
        if is_given(prefix, *group):
            _, *size = compressor_state_append.check(*group, *at, prefix)
            pointers += group
            sizes.append(size)
    if T == 0:
        return
    (ROWS, WIDTH), (ROWS_2, WIDTH_2) = [*sizes, [1, 1], [1, 1]][:2]
    # What is not there is not looked at: any pointer will do.
    cache_step_append_kernel[(T, 1 + len(sizes))](
        kv, window, *pointers, *[window] * (6 - len(pointers)), *at, stride, rows,
        C=C, R=rope_dim, BLOCK_C=triton.next_power_of_2(C), STATES=len(sizes),
        ROWS=ROWS, WIDTH=WIDTH, BLOCK=triton.next_power_of_2(WIDTH),
        ROWS_2=ROWS_2, WIDTH_2=WIDTH_2, BLOCK_2=triton.next_power_of_2(WIDTH_2),
        **CONFIG, **PDL, **EXACT,
    )  # fmt: skip


def is_given(prefix: str, *group: Tensor | None) -> bool:
    """Whether there are rows for a state: kappa, gamma and the state, or none of the three."""
    names = [f"{prefix}{name}" for name in ("kappa", "gamma", "state")]
    given = [name for name, x in zip(names, group, strict=True) if x is not None]
    if given and len(given) < len(names):
        missing = next(name for name in names if name not in given)
        raise ValueError(
            f"{missing}: expected all of {', '.join(names)} or none, got {', '.join(given)} alone"
        )
    return bool(given)


SPEC = KernelSpec("cache_step_append/triton", launch, runs_on_cpu=INTERPRETED)
