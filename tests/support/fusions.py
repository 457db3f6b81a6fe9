"""Where production code calls the fused ops that `--no-fusion` names."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest

from dsv4.layers import attention, compressor, indexer, mhc, moe
from dsv4.model import trunk

Wrapper = Callable[[Callable, tuple], Any]

# Name -> module, its ops, and the argument that only the whole step has, with its value else.
CALLS: dict[str, tuple[ModuleType, tuple[str, ...], tuple[int, object] | None]] = {
    "mhc_post_pre": (mhc, ("mhc_post_pre",), None),
    "latent_kv_norm_pack": (attention, ("latent_kv_norm_pack",), None),
    "joined_wide_linear": (compressor, ("joined_wide_linear",), None),
    "entry_and_key_insert": (compressor, ("entry_and_key_insert",), None),
    "cache_step_append": (attention, ("cache_step_append",), None),
    "embed_streams": (trunk, ("embed_streams",), (2, 1)),
    "q_norm_rope": (attention, ("q_norm_rope",), None),
    "index_query_rope": (indexer, ("indexer_scores_topk",), (12, None)),
    "sparse_attn_inverse_rope": (
        attention, ("sparse_attn_prefill", "sparse_attn_decode"), (11, None)
    ),
    "gate_up_swiglu": (moe, ("gate_up_swiglu",), None),
    "moe_routed_shared": (moe, ("moe_routed",), (10, None)),
    "moe_with_shared": (moe, ("moe_with_shared",), None),
}  # fmt: skip


def wrap_fused(patch: pytest.MonkeyPatch, name: str, wrapper: Wrapper) -> None:
    """Let `wrapper(op, args)` answer every call of the fused step `name`, and of nothing else."""
    module, ops, mark = CALLS[name]

    def wrapped(op: Callable) -> Callable:
        def call(*args: Any) -> Any:
            is_whole = mark is None or args[mark[0]] is not mark[1]
            return wrapper(op, args) if is_whole else op(*args)

        return call

    for op in ops:
        patch.setattr(module, op, wrapped(getattr(module, op)))


def watch_fused(patch: pytest.MonkeyPatch, name: str) -> list[Callable]:
    """-> the ops that were called as the fused step `name`, as they come."""
    used: list[Callable] = []

    def watching(op: Callable, args: tuple) -> Any:
        used.append(op)
        return op(*args)

    wrap_fused(patch, name, watching)
    return used
