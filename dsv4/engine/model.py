"""Tier 2 put together: trunk, cache and tables on one device."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any
from warnings import warn

import torch
from torch import Tensor

from dsv4.cache.manager import CacheManager
from dsv4.cache.request import CachedRequest, Step
from dsv4.cache.schema import CacheSchema
from dsv4.cache.storage import CacheStorage
from dsv4.core.config import ModelConfig
from dsv4.core.errors import DeviceUnavailable, RequestError
from dsv4.core.kv_layout import DEFAULT_PAGE_TOKENS
from dsv4.core.numbers import is_integer
from dsv4.kernels.common.cuda import why_not
from dsv4.layers.batch import Batch
from dsv4.layers.indexer import IndexerForm
from dsv4.layers.rope import RopeTables
from dsv4.layers.weights import DeviceWeights
from dsv4.model.mtp import MtpBlock
from dsv4.model.trunk import Trunk

MAX_DECODE_ROWS = 64  # of one step: so many the kernels for few rows take
FIRST_SM = 9  # kernels start under the one before them, which Hopper was the first to know
DEFAULT_MAX_CONTEXT, DEFAULT_MAX_ROWS = 32_768, 2048


@dataclass(frozen=True)
class EngineLimits:
    """How much room an engine has; all of it is allocated when it is built.

    max_context   tokens of one request, prompt and answer; None for DEFAULT_MAX_CONTEXT or what
                  the model allows, whichever is less
    max_requests  requests that can be resident at once
    max_tokens    tokens of all resident requests together; None for max_context each
    max_rows      rows of one step, which bounds the memory of activations; recorded steps keep
                  those of up to 1,024 rows besides
    prefix_bytes  host memory for shared prefixes: of each prompt, its last whole block of 128 ids
                  and what is before it, so prompts must share all of that to profit
    page_tokens   tokens of a page

    Raises RequestError for numbers that are no counts.
    """

    max_context: int | None = None
    max_requests: int = 1
    max_tokens: int | None = None
    max_rows: int = DEFAULT_MAX_ROWS
    prefix_bytes: int = 0
    page_tokens: int = DEFAULT_PAGE_TOKENS

    def __post_init__(self) -> None:
        for name, low in (
            ("max_context", 2), ("max_requests", 1), ("max_tokens", 1), ("max_rows", 1),
            ("prefix_bytes", 0),
        ):  # fmt: skip
            value: Any = getattr(self, name)
            is_unset = name in ("max_context", "max_tokens") and value is None
            if not (is_unset or _is_count(value, low)):
                raise RequestError(name, f"an integer from {low}", value)
        if self.max_requests > MAX_DECODE_ROWS:
            raise RequestError("max_requests", f"1 to {MAX_DECODE_ROWS}", self.max_requests)

    def context(self, config: ModelConfig) -> int:
        """Tokens of one request, as a number. Raises RequestError for more than the model's."""
        limit = config.max_position_embeddings
        if self.max_context is None:
            return min(limit, DEFAULT_MAX_CONTEXT)
        if self.max_context > limit:
            raise RequestError("max_context", f"2 to {limit:,}", self.max_context)
        return self.max_context

    def num_pages(self, config: ModelConfig) -> int:
        """Pages to allocate, the null page and one partly filled for each request included."""
        tokens = self.max_tokens
        if tokens is None:
            tokens = self.max_requests * self.context(config)
        return -(-tokens // self.page_tokens) + self.max_requests + 1


def _is_count(value: Any, low: int) -> bool:
    return is_integer(value) and value >= low


def usable_device(device: torch.device | str) -> torch.device:
    """The device with its index. Raises DeviceUnavailable for one that torch cannot use.

    Kernels start on the current device, so it has to be that one.
    """
    try:
        found = torch.device(device)
    except RuntimeError:
        raise DeviceUnavailable(str(device), "expected cuda, cuda:N or cpu") from None
    if found.type != "cuda":
        return found
    if not torch.cuda.is_available():
        fix = "TRITON_INTERPRET=1 and device cpu run a few tokens (minutes); tier 1 needs no GPU"
        raise DeviceUnavailable(str(found), "torch finds no CUDA device", fix)
    current = torch.cuda.current_device()
    if found.index not in (None, current):
        fix = f"set CUDA_VISIBLE_DEVICES={found.index} and use cuda"
        raise DeviceUnavailable(str(found), f"the current device is cuda:{current}", fix)
    major, minor = torch.cuda.get_device_capability(current)
    if major < FIRST_SM:
        detail = f"its kernels need SM {FIRST_SM}.0 or later, this is SM {major}.{minor}"
        raise DeviceUnavailable(str(found), detail, "use tier 1 on this device")
    return torch.device("cuda", current)


def warn_of_slow_kernels(device: torch.device) -> None:
    """A RuntimeWarning where Triton stands in for kernels that are made for the device."""
    is_hopper = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9
    if is_hopper and (reason := why_not()):
        warn(f"tier 2 runs without its CUDA C++ kernels, slower: {reason}", RuntimeWarning, 3)


class ProductionModel:
    """DeepSeek-V4 on quantised weights and a paged cache.

    stored  (official stored name, tensor) of a whole checkpoint, each copied to the device
    form    how index keys are kept
    unfused steps to run as their parts, of dsv4.model.block.FUSED
    with_mtp whether to load the first MTP block, for drafts

    Raises ConfigError for formats without production kernels.
    """

    def __init__(
        self, config: ModelConfig, stored: Iterable[tuple[str, Tensor]],
        device: torch.device | str = "cuda", limits: EngineLimits | None = None,
        form: IndexerForm | None = None, unfused: Collection[str] = (), with_mtp: bool = False,
    ) -> None:  # fmt: skip
        limits, form = limits or EngineLimits(), form or IndexerForm()
        self.config, self.device = config, usable_device(device)
        warn_of_slow_kernels(self.device)
        self.limits, self.max_context = limits, limits.context(config)
        if limits.max_rows < limits.max_requests:
            expected = f"max_requests {limits.max_requests} or more"
            raise RequestError("max_rows", expected, limits.max_rows)
        if with_mtp and not (config.num_nextn_predict_layers and not config.dspark_block_size):
            raise RequestError("with_mtp", "a checkpoint with an MTP block", with_mtp)
        weights = DeviceWeights.load(config, stored, self.device, with_mtp)
        # The trunk keeps what it uses: matrices that it joins are not held twice.
        self.trunk, self.weight_bytes = Trunk.of(config, weights, form, unfused), weights.nbytes
        self.mtp = MtpBlock.of(config, weights, form, unfused) if with_mtp else None
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

    def batch(self, step: Step, ids: Tensor, is_prefill: bool) -> Batch:
        """The rows of a prepared step with their ids [T]."""
        return Batch.of(
            ids, step.rows, step.page_table, self.ropes, self.limits.page_tokens, is_prefill,
            self.trunk.embedding.dtype,
        )  # fmt: skip

    def streams(self, step: Step, ids: Tensor, is_prefill: bool) -> Tensor:
        """Run a prepared step: ids [T] of its rows -> streams [T, N, D]. The caller ends it."""
        return self.trunk.streams(self.batch(step, ids, is_prefill), self.storage)
