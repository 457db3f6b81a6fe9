"""Cache ops, registered as torch.ops.dsv4.*; what each does is said by its oracle.

Within a step and layer, compressor_insert and index_key_insert read the state ring as the step
before left it, so compressor_state_append comes after them; in a step that verifies draft tokens,
both appends of all layers come after the verification. cache_step_append is all appends of a layer,
entry_and_key_insert both inserts.
"""

import torch
from torch import Tensor

from dsv4.core.dispatch import select
from dsv4.core.op import dsv4_op
from dsv4.kernels import cache as kernels

# Best first.
KV_WINDOW_APPEND = (kernels.kv_window_append.SPEC,)
COMPRESSOR_INSERT = (kernels.compressor_insert.SPEC,)
INDEX_KEY_INSERT = (kernels.index_key_insert.SPEC,)
ENTRY_AND_KEY_INSERT = (kernels.entry_and_key_insert.SPEC,)
COMPRESSOR_STATE_APPEND = (kernels.compressor_state_append.SPEC,)
CACHE_STEP_APPEND = (kernels.cache_step_append.SPEC,)
CACHE_RESET = (kernels.cache_reset.SPEC,)
GATHER_WINDOW = (kernels.gather_window.SPEC,)
GATHER_ENTRIES = (kernels.gather_entries.SPEC,)
GATHER_INDEX_KEYS = (kernels.gather_index_keys.SPEC,)
GATHER_RECORDS = (kernels.gather_records.SPEC,)


def _nothing(*args: object, **kwargs: object) -> None:
    """The fake of an op that only changes tensors."""


@dsv4_op(fake=_nothing, mutates=("window",))
def kv_window_append(
    kv: Tensor, window: Tensor, slot: Tensor, position: Tensor, end_position: Tensor,
    rows: int, rope_dim: int,
) -> None:  # fmt: skip
    """See dsv4.reference.cache_writes.kv_window_append."""
    kernel = select(KV_WINDOW_APPEND, kv.device)
    kernel.launch(kv, window, slot, position, end_position, rows, rope_dim)


@dsv4_op(fake=_nothing, mutates=("pages",))
def compressor_insert(
    kappa: Tensor, gamma: Tensor, state: Tensor, norm: Tensor, cos: Tensor, sin: Tensor,
    pages: Tensor, page_table: Tensor, slot: Tensor, position: Tensor, first_row: Tensor,
    first_position: Tensor, ratio: int, entries_per_page: int, eps: float, dtype: torch.dtype,
) -> None:  # fmt: skip
    """See dsv4.reference.cache_writes.compressor_insert."""
    args = (
        kappa, gamma, state, norm, cos, sin, pages, page_table, slot, position, first_row,
        first_position, ratio, entries_per_page, eps, dtype,
    )  # fmt: skip
    kernel = select(COMPRESSOR_INSERT, kappa.device)
    kernel.launch(*args, kernels.compressor_insert.scratch(*args))


@dsv4_op(fake=_nothing, mutates=("pages",))
def index_key_insert(
    kappa: Tensor, gamma: Tensor, state: Tensor, norm: Tensor, cos: Tensor, sin: Tensor,
    pages: Tensor, page_table: Tensor, slot: Tensor, position: Tensor, first_row: Tensor,
    first_position: Tensor, ratio: int, entries_per_page: int, eps: float, dtype: torch.dtype,
    keys: str, is_rotated: bool,
) -> None:  # fmt: skip
    """See dsv4.reference.cache_writes.index_key_insert."""
    select(INDEX_KEY_INSERT, kappa.device).launch(
        kappa, gamma, state, norm, cos, sin, pages, page_table, slot, position, first_row,
        first_position, ratio, entries_per_page, eps, dtype, keys, is_rotated,
    )  # fmt: skip


@dsv4_op(fake=_nothing, mutates=("pages", "index_pages"))
def entry_and_key_insert(
    kappa: Tensor, gamma: Tensor, state: Tensor, norm: Tensor, pages: Tensor,
    index_kappa: Tensor, index_gamma: Tensor, index_state: Tensor, index_norm: Tensor,
    index_pages: Tensor, cos: Tensor, sin: Tensor, page_table: Tensor, slot: Tensor,
    position: Tensor, first_row: Tensor, first_position: Tensor, ratio: int,
    entries_per_page: int, eps: float, dtype: torch.dtype, keys: str, is_rotated: bool,
) -> None:  # fmt: skip
    """See dsv4.reference.cache_writes.entry_and_key_insert."""
    args = (
        kappa, gamma, state, norm, pages, index_kappa, index_gamma, index_state, index_norm,
        index_pages, cos, sin, page_table, slot, position, first_row, first_position, ratio,
        entries_per_page, eps, dtype, keys, is_rotated,
    )  # fmt: skip
    kernel = select(ENTRY_AND_KEY_INSERT, kappa.device)
    kernel.launch(*args, kernels.entry_and_key_insert.scratch(*args))


@dsv4_op(fake=_nothing, mutates=("state",))
def compressor_state_append(
    kappa: Tensor, gamma: Tensor, state: Tensor, slot: Tensor, position: Tensor,
    end_position: Tensor,
) -> None:  # fmt: skip
    """See dsv4.reference.cache_writes.compressor_state_append."""
    kernel = select(COMPRESSOR_STATE_APPEND, kappa.device)
    kernel.launch(kappa, gamma, state, slot, position, end_position)


@dsv4_op(fake=_nothing, mutates=("window", "state", "index_state"))
def cache_step_append(
    kv: Tensor, window: Tensor, kappa: Tensor | None, gamma: Tensor | None, state: Tensor | None,
    index_kappa: Tensor | None, index_gamma: Tensor | None, index_state: Tensor | None,
    slot: Tensor, position: Tensor, end_position: Tensor, rows: int, rope_dim: int,
) -> None:  # fmt: skip
    """See dsv4.reference.cache_writes.cache_step_append."""
    select(CACHE_STEP_APPEND, kv.device).launch(
        kv, window, kappa, gamma, state, index_kappa, index_gamma, index_state, slot, position,
        end_position, rows, rope_dim,
    )  # fmt: skip


@dsv4_op(fake=_nothing, mutates=("state",))
def cache_reset(state: Tensor, slot: Tensor) -> None:
    """See dsv4.reference.cache_writes.cache_reset."""
    select(CACHE_RESET, state.device).launch(state, slot)


@dsv4_op(fake=kernels.gather_window.outputs)
def gather_window(
    window: Tensor, slot: Tensor, position: Tensor, rows: int, head_dim: int, rope_dim: int,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """See dsv4.reference.cache_writes.gather_window."""
    args = (window, slot, position, rows, head_dim, rope_dim, dtype)
    out = kernels.gather_window.outputs(*args)
    select(GATHER_WINDOW, window.device).launch(*args, out)
    return out


@dsv4_op(fake=kernels.gather_entries.outputs)
def gather_entries(
    pages: Tensor, page_table: Tensor, slot: Tensor, entry: Tensor, entries_per_page: int,
    head_dim: int, rope_dim: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """See dsv4.reference.cache_writes.gather_entries."""
    args = (pages, page_table, slot, entry, entries_per_page, head_dim, rope_dim, dtype)
    out = kernels.gather_entries.outputs(*args)
    select(GATHER_ENTRIES, pages.device).launch(*args, out)
    return out


@dsv4_op(fake=kernels.gather_index_keys.outputs)
def gather_index_keys(
    pages: Tensor, page_table: Tensor, slot: Tensor, entry: Tensor, entries_per_page: int,
    head_dim: int, keys: str, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """See dsv4.reference.cache_writes.gather_index_keys."""
    args = (pages, page_table, slot, entry, entries_per_page, head_dim, keys, dtype)
    out = kernels.gather_index_keys.outputs(*args)
    select(GATHER_INDEX_KEYS, pages.device).launch(*args, out)
    return out


@dsv4_op(fake=kernels.gather_records.outputs)
def gather_records(
    store: Tensor, page: Tensor, row: Tensor, num_rows: int, value_bytes: int, scale_bytes: int
) -> Tensor:
    """See dsv4.reference.cache_writes.gather_records."""
    args = (store, page, row, num_rows, value_bytes, scale_bytes)
    out = kernels.gather_records.outputs(*args)
    select(GATHER_RECORDS, store.device).launch(*args, out)
    return out
