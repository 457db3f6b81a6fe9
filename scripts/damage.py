"""Ways to break the reference model while a block runs: the negative controls of the gates."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dsv4.reference import compressor, layer

Damage = Callable[[], AbstractContextManager[None]]


@contextmanager
def patched(owner: Any, name: str, replacement: Any) -> Iterator[None]:
    """Replace one function or method while the block runs."""
    original = getattr(owner, name)
    setattr(owner, name, replacement)
    try:
        yield
    finally:
        setattr(owner, name, original)


def _replacing(owner: Any, name: str, make: Callable[[Any], Any]) -> Damage:
    return lambda: patched(owner, name, make(getattr(owner, name)))


def _none_chosen(_: Any) -> Any:
    return lambda scores, visible, k: visible.new_full((len(scores), 1), -1)


def _all_chosen(_: Any) -> Any:
    return lambda scores, visible, k: layer.all_entries_indices(visible, scores.shape[1])


def _random_chosen(original: Any) -> Any:
    rng = torch.Generator().manual_seed(torch.initial_seed())

    def choose(scores: Tensor, visible: Tensor, k: int) -> Tensor:
        noise = torch.rand(scores.shape, generator=rng).masked_fill(scores.isinf(), -torch.inf)
        return original(noise, visible, k)

    return choose


def _recent_chosen(original: Any) -> Any:
    def choose(scores: Tensor, visible: Tensor, k: int) -> Tensor:
        age = torch.arange(scores.shape[1]).float().expand_as(scores)
        return original(age.masked_fill(scores.isinf(), -torch.inf), visible, k)

    return choose


def _uniform_comb(original: Any) -> Any:
    def split(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
        pre, post, comb = original(*args)
        return pre, post, torch.full_like(comb, 1 / comb.shape[-1])

    return split


def _no_inverse(rope: Any) -> Any:
    def apply(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool = False) -> Tensor:
        return x if inverse else rope(x, cos, sin)

    return apply


def _reversed(rope: Any) -> Any:
    return lambda x, cos, sin, inverse=False: rope(x, cos, sin, not inverse)


def _no_overlap(pool: Any) -> Any:
    def apply(kappa: Tensor, gamma: Tensor) -> Tensor:
        d = kappa.shape[-1] // 2
        return compressor.pool_windows(kappa[..., d:], gamma[..., d:])

    return apply


def _shifted_entries(entries: Any) -> Any:
    return lambda self, x, positions, w, state, first: entries(
        self, x, positions, w, state, first + 1
    )


def _forgotten_window(compress: Any) -> Any:
    """A call of several tokens forgets the window it leaves open, as if it ended on a boundary."""

    def apply(state: Any, kappa: Tensor, gamma: Tensor, kind: Any) -> tuple[Tensor, Any]:
        entries, state = compress(state, kappa, gamma, kind)
        is_open = torch.arange(state.start, state.length) >= state.length // kind.ratio * kind.ratio
        if len(kappa) > 1:
            state = replace(state, kappa=state.kappa.masked_fill(is_open[:, None], 0.0))
        return entries, state

    return apply


# Attention that cannot look back in one way; each must fail the gate it is for.
BLIND: dict[str, Damage] = {
    "CSA empty": _replacing(layer, "indexer_topk", _none_chosen),
    "CSA random top-k": _replacing(layer, "indexer_topk", _random_chosen),
    "CSA recent top-k": _replacing(layer, "indexer_topk", _recent_chosen),
    "HCA empty": _replacing(
        layer,
        "all_entries_indices",
        lambda f: lambda visible, n: torch.full_like(f(visible, n), -1),
    ),
}
DENSE = _replacing(layer, "indexer_topk", _all_chosen)

# Mistakes an implementation could make; each must break a gate or raise the loss.
MISTAKES: dict[str, Damage] = {
    "sink dropped": _replacing(
        layer, "sparse_attn",
        lambda f: lambda q, kv, i, sink, scale: f(q, kv, i, torch.full_like(sink, -1e30), scale),
    ),
    "inverse RoPE dropped": _replacing(layer, "apply_rope", _no_inverse),
    "overlap dropped": _replacing(compressor, "pool_overlapping_windows", _no_overlap),
    "entry position shifted": _replacing(layer.Layer, "_entries", _shifted_entries),
    "entries one step early": _replacing(
        layer, "visible_entries", lambda f: lambda positions, ratio: f(positions + 1, ratio)
    ),
    "open window forgotten": _replacing(layer, "compress", _forgotten_window),
    "score bias dropped": _replacing(
        layer, "router_topk", lambda f: lambda scores, bias, k: f(scores, bias * 0, k)
    ),
    "wrong hash row": _replacing(
        layer, "router_hash", lambda f: lambda table, ids: f(table, (ids + 1) % len(table))
    ),
    "mHC comb uniform": _replacing(layer, "mhc_split_sinkhorn", _uniform_comb),
    "RoPE sign flipped": _replacing(layer, "apply_rope", _reversed),
}  # fmt: skip
