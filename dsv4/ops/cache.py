"""Cache ops, registered as torch.ops.dsv4.*; what each does is said by its oracle.

Within a step, per layer: compressor_insert and index_key_insert read the state ring as the step
before left it, so compressor_state_append comes after them.
"""

import torch
from torch import Tensor

from dsv4.core.dispatch import select
from dsv4.core.op import dsv4_op
from dsv4.kernels.cache import (
    cache_reset as cache_reset_triton,
)
from dsv4.kernels.cache import (
    compressor_insert as compressor_insert_triton,
)
from dsv4.kernels.cache import (
    compressor_state_append as compressor_state_append_triton,
)
from dsv4.kernels.cache import (
    gather_entries as gather_entries_triton,
)
from dsv4.kernels.cache import (
    gather_index_keys as gather_index_keys_triton,
)
from dsv4.kernels.cache import (
    gather_records as gather_records_triton,
)
from dsv4.kernels.cache import (
    gather_window as gather_window_triton,
)
from dsv4.kernels.cache import (
    index_key_insert as index_key_insert_triton,
)
from dsv4.kernels.cache import (
    kv_window_append as kv_window_append_triton,
)

# Best first.
KV_WINDOW_APPEND = (kv_window_append_triton.SPEC,)
COMPRESSOR_INSERT = (compressor_insert_triton.SPEC,)
INDEX_KEY_INSERT = (index_key_insert_triton.SPEC,)
COMPRESSOR_STATE_APPEND = (compressor_state_append_triton.SPEC,)
CACHE_RESET = (cache_reset_triton.SPEC,)
GATHER_WINDOW = (gather_window_triton.SPEC,)
GATHER_ENTRIES = (gather_entries_triton.SPEC,)
GATHER_INDEX_KEYS = (gather_index_keys_triton.SPEC,)
GATHER_RECORDS = (gather_records_triton.SPEC,)
