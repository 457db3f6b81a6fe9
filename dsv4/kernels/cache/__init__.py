"""Writes into the KV cache and dense reads of it. Triton: GPUs from SM 9.0, and the interpreter.

The model runs entry_and_key_insert (CSA), compressor_insert (HCA) and cache_step_append; the other
inserts and appends are the parts of these. cache_reset and gather_* serve tests.
"""

from dsv4.kernels.cache import (
    cache_reset,
    cache_step_append,
    compressor_insert,
    compressor_state_append,
    entry_and_key_insert,
    gather_entries,
    gather_index_keys,
    gather_records,
    gather_window,
    index_key_insert,
    kv_window_append,
)

__all__ = [
    "cache_reset",
    "cache_step_append",
    "compressor_insert",
    "compressor_state_append",
    "entry_and_key_insert",
    "gather_entries",
    "gather_index_keys",
    "gather_records",
    "gather_window",
    "index_key_insert",
    "kv_window_append",
]
