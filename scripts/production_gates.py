"""The production path as the gates see a model, and the ways to blind it."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from damage import Damage, patched
from torch import Tensor

from dsv4.cache.manager import CacheManager
from dsv4.cache.request import CachedRequest
from dsv4.core.config import LayerKind
from dsv4.core.inventory import of_trunk
from dsv4.engine.model import EngineLimits, ProductionModel
from dsv4.engine.single import SingleSequence
from dsv4.layers import attention, indexer
from dsv4.loader.checkpoint import Checkpoint
from dsv4.ops.indexer import topk_select

CONTEXT, REQUESTS = 8192, 48  # as many as the short form keeps
BF16_CUTS_AGREE = 5e-2  # logits of one text in other cuts: kernels for few and for many rows


class Kept:
    """A request that is copied by a fork, as the gates copy caches, and released when forgotten."""

    def __init__(self, cache: CacheManager, request: CachedRequest) -> None:
        self.cache, self.request = cache, request

    def __deepcopy__(self, memo: object) -> Kept:
        return Kept(self.cache, self.cache.fork(self.request))

    def __del__(self) -> None:
        self.cache.release(self.request)


class ProductionGatesModel:
    """Tier 2 with the interface of tiers 0 and 1; logits come back to the CPU."""

    def __init__(self, checkpoint: Checkpoint, args: Namespace) -> None:
        stored = checkpoint.stream(keep=of_trunk)
        limits = EngineLimits(CONTEXT, REQUESTS)
        self.config = checkpoint.config
        self.model = ProductionModel(checkpoint.config, stored, args.device, limits)
        self.one = SingleSequence(self.model)

    def new_cache(self) -> Kept:
        """An empty cache."""
        return Kept(self.model.cache, self.model.cache.admit())

    def forward(self, ids: Tensor, cache: Kept, last_only: bool = False) -> Tensor:
        """Logits of more tokens."""
        return self.one.forward(ids.to(self.model.device), cache.request, last_only).cpu()


def _choosing(scores_of: Callable[[Tensor], Tensor]) -> Damage:
    """Choose by other scores: of an empty [T, S] tensor, S entries that somebody sees."""

    def choose(
        q: Tensor, head_weights: Tensor, pages: Tensor, page_table: Tensor, slot: Tensor,
        position: Tensor, ratio: int, *rest: Any,
    ) -> Tensor:  # fmt: skip
        visible = torch.where(slot >= 0, (position + 1) // ratio, 0)
        scores = scores_of(q.new_empty(len(q), max(int(visible.max()), 1), dtype=torch.float32))
        return topk_select(scores, visible, rest[1])

    return lambda: patched(indexer, "indexer_scores_topk", choose)


def _nothing_chosen(*args: Any) -> Tensor:
    return args[0].new_full((len(args[0]), args[8]), -1, dtype=torch.int32)


@contextmanager
def _hca_empty() -> Iterator[None]:
    """Layers of HCA get a page table without columns."""

    def blind(attend: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*args: Any) -> Tensor:
            q, step, window, pages, table, entries, *rest = args
            if entries is None and rest[10] == LayerKind.HCA.ratio:
                table = table[:, :0].contiguous()
            return attend(q, step, window, pages, table, entries, *rest)

        return call

    with ExitStack() as stack:
        for name in ("sparse_attn_prefill", "sparse_attn_decode"):
            stack.enter_context(patched(attention, name, blind(getattr(attention, name))))
        yield


BLIND: dict[str, Damage] = {
    "CSA empty": lambda: patched(indexer, "indexer_scores_topk", _nothing_chosen),
    "CSA random top-k": _choosing(lambda empty: empty.uniform_()),
    "CSA recent top-k": _choosing(
        lambda empty: torch.arange(empty.shape[1], device=empty.device).expand_as(empty).float()
    ),
    "HCA empty": _hca_empty,
}


def dense() -> Any:
    """All entries instead of a choice."""
    return patched(indexer, "indexer_scores_topk", lambda *args: None)
