"""Tier 2 put together: trunk, cache and tables on one device."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dsv4.cache.manager import CacheManager
from dsv4.cache.request import CachedRequest, Step
from dsv4.cache.schema import CacheSchema
from dsv4.cache.storage import CacheStorage
from dsv4.core.config import ModelConfig
from dsv4.core.errors import RequestError
from dsv4.core.kv_layout import DEFAULT_PAGE_TOKENS
from dsv4.layers.batch import Batch
from dsv4.layers.indexer import IndexerForm
from dsv4.layers.rope import RopeTables
from dsv4.layers.weights import DeviceWeights
from dsv4.model.trunk import Trunk

DEFAULT_MAX_CONTEXT = 32_768


@dataclass(frozen=True)
class EngineLimits:
    """How much room an engine has; all of it is allocated when it is built.

    max_context   tokens of one request, prompt and answer; None for DEFAULT_MAX_CONTEXT or what
                  the model allows, whichever is less
    max_requests  requests that can be resident at once
    max_tokens    tokens of all resident requests together; None for max_context each
    max_rows      rows of one step, which bounds the memory of activations
    prefix_bytes  host memory for shared prefixes
    page_tokens   tokens of a page
    """

    max_context: int | None = None
    max_requests: int = 1
    max_tokens: int | None = None
    max_rows: int = 512
    prefix_bytes: int = 0
    page_tokens: int = DEFAULT_PAGE_TOKENS

    def context(self, config: ModelConfig) -> int:
        """Tokens of one request, as a number. Raises RequestError for more than the model's."""
        limit = config.max_position_embeddings
        if self.max_context is None:
            return min(limit, DEFAULT_MAX_CONTEXT)
        if not 1 <= self.max_context <= limit:
            raise RequestError("max_context", f"1 to {limit:,}", self.max_context)
        return self.max_context

    def num_pages(self, config: ModelConfig) -> int:
        """Pages to allocate, the null page and one partly filled for each request included."""
        tokens = self.max_tokens
        if tokens is None:
            tokens = self.max_requests * self.context(config)
        return -(-tokens // self.page_tokens) + self.max_requests + 1


class ProductionModel:
    """DeepSeek-V4 on quantised weights and a paged cache.

    stored  (official stored name, tensor) of a whole checkpoint, each copied to the device
    form    how index keys are kept
    unfused steps to run as their parts, of dsv4.model.block.FUSED

    Raises ConfigError for formats without production kernels.
    """

    def __init__(
        self, config: ModelConfig, stored: Iterable[tuple[str, Tensor]],
        device: torch.device | str = "cuda", limits: EngineLimits | None = None,
        form: IndexerForm | None = None, unfused: Collection[str] = (),
    ) -> None:  # fmt: skip
        limits, form = limits or EngineLimits(), form or IndexerForm()
        self.config, self.device = config, torch.device(device)
        if self.device.type == "cuda" and self.device.index is None:
            self.device = torch.device("cuda", torch.cuda.current_device())
        self.limits, self.max_context = limits, limits.context(config)
        if limits.max_rows < limits.max_requests:
            expected = f"max_requests {limits.max_requests} or more"
            raise RequestError("max_rows", expected, limits.max_rows)
        weights = DeviceWeights.load(config, stored, self.device)
        # The trunk keeps what it uses: matrices that it joins are not held twice.
        self.trunk, self.weight_bytes = Trunk.of(config, weights, form, unfused), weights.nbytes
        del weights
        schema = CacheSchema.of(
            config, num_pages=limits.num_pages(config), num_slots=limits.max_requests,
            page_tokens=limits.page_tokens, index_keys=form.keys,
        )  # fmt: skip
        self.storage = CacheStorage(schema, self.device)
        self.cache = CacheManager(
            self.storage, self.max_context, limits.prefix_bytes, max_rows=limits.max_rows
        )
        self.ropes = RopeTables(config, self.max_context, self.device)

    def prepare(
        self, batch: Sequence[tuple[CachedRequest, int]], num_rows: int | None = None
    ) -> Step:
        """See CacheManager.prepare."""
        return self.cache.prepare(batch, num_rows)

    def streams(self, step: Step, ids: Tensor, is_prefill: bool) -> Tensor:
        """Run a prepared step: ids [T] of its rows -> streams [T, N, D]. The caller ends it."""
        batch = Batch.of(
            ids, step.rows, step.page_table, self.ropes, self.limits.page_tokens, is_prefill,
            self.trunk.embedding.dtype,
        )  # fmt: skip
        return self.trunk.streams(batch, self.storage)
