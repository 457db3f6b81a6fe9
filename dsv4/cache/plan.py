"""Does it fit: the memory of a model, a context and a batch, computed from the config alone."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction

from dsv4.cache.schema import CacheSchema
from dsv4.core.config import ModelConfig
from dsv4.core.errors import RequestError
from dsv4.core.inventory import TensorSpec, tensor_specs
from dsv4.core.kv_layout import DEFAULT_PAGE_TOKENS, IndexKeys, check_page_tokens, growth_per_token

# Matrices with a dim of heads, groups, channels or words, which GPUs can divide among them.
DIVIDED = ("wq_b", "wo_a", "wo_b", "shared_experts", "embed", "head")


@dataclass(frozen=True)
class MemoryPlan:
    """The result of `plan`. Sizes in bytes; "per GPU" is the GPU that holds most.

    weight_file_bytes       all tensors of the checkpoint, headers not counted
    weight_bytes            weights per GPU
    kv_page_set_bytes       one page: `page_tokens` tokens of one request, over all layers
    pages_per_request       pages a request of `context` tokens needs, the last one rounded up
    kv_token_bytes          bytes of pages that stand for one token, page padding included
    kv_request_bytes        all bytes of one request: its pages and kv_fixed_per_request
    kv_page_bytes           the paged allocation: pages of the batch and the null page
    kv_fixed_per_request    window rings and compressor state of one request, MTP windows included
    kv_fixed_bytes          the state allocation: the same for the batch
    kv_bytes                kv_page_bytes + kv_fixed_bytes, per GPU: what CacheStorage allocates,
                            bytes between stores that begin on multiples of 128 included
    kv_growth               bytes one more token of one request adds, page padding not counted
    total_bytes             weight_bytes + kv_bytes, per GPU
    memory_bytes            memory of one GPU, when it was given
    largest_context         tokens every request of the batch can have in `memory_bytes`, whole
                            pages, at most the model's limit; 0 when none; None without memory_bytes
    """

    gpus: int
    context: int
    batch: int
    index_keys: IndexKeys
    page_tokens: int
    weight_file_bytes: int
    weight_bytes: int
    kv_page_set_bytes: int
    pages_per_request: int
    kv_token_bytes: Fraction
    kv_request_bytes: int
    kv_page_bytes: int
    kv_fixed_per_request: int
    kv_fixed_bytes: int
    kv_bytes: int
    kv_growth: Fraction
    total_bytes: int
    memory_bytes: int | None = None
    largest_context: int | None = None

    @property
    def fits(self) -> bool | None:
        """Whether `total_bytes` is within `memory_bytes`; None when that was not given."""
        return None if self.memory_bytes is None else self.total_bytes <= self.memory_bytes

    @property
    def spare_bytes(self) -> int | None:
        """What is left of `memory_bytes`, negative when it does not fit."""
        return None if self.memory_bytes is None else self.memory_bytes - self.total_bytes


def plan(
    config: ModelConfig,
    *,
    gpus: int = 1,
    context: int,
    batch: int,
    index_keys: IndexKeys = "fp8",
    page_tokens: int = DEFAULT_PAGE_TOKENS,
    memory_bytes: int | None = None,
) -> MemoryPlan:
    """Plan the memory of `batch` requests of `context` tokens each on `gpus` GPUs.

    context       tokens of a request, prompt and reply, at most the model's limit
    index_keys    "fp8" or "mxfp4"
    page_tokens   a multiple of 128
    memory_bytes  memory of one GPU, to judge the fit and to find the largest context

    Weights count in the precision of the checkpoint. Activations, workspaces, graphs and what the
    driver takes are not counted: keep a reserve.

    More than one GPU is an assumption, no part of the package runs that way yet: routed experts are
    dealt out whole, ceil(E / gpus) to the fullest GPU; wq_b, wo_a, wo_b, the shared expert, the
    embedding and the head are divided evenly; everything else (wq_a, wkv, router, compressors,
    mHC, norms, MTP projections) is replicated. So is the whole KV cache, because K and V are one
    head that every GPU reads. Raises RequestError for an argument out of range.
    """
    _check_arguments(config, gpus, context, batch, memory_bytes)
    specs = tensor_specs(config).values()
    weights = weight_bytes_per_gpu(config, specs, gpus)

    check_page_tokens(page_tokens)
    schema = CacheSchema.of(
        config, num_pages=batch * -(-context // page_tokens) + 1, num_slots=batch,
        page_tokens=page_tokens, index_keys=index_keys,
    )  # fmt: skip
    largest = None
    if memory_bytes is not None:
        pages = CacheSchema.pages_within(
            config, nbytes=memory_bytes - weights, num_slots=batch, page_tokens=page_tokens,
            index_keys=index_keys,
        )  # fmt: skip
        each = max(pages - 1, 0) // batch
        largest = min(each * page_tokens, config.max_position_embeddings)
    return MemoryPlan(
        gpus=gpus,
        context=context,
        batch=batch,
        index_keys=index_keys,
        page_tokens=page_tokens,
        weight_file_bytes=sum(s.nbytes for s in specs),
        weight_bytes=weights,
        kv_page_set_bytes=schema.page_stride,
        pages_per_request=schema.pages_for(context),
        kv_token_bytes=Fraction(schema.page_stride, page_tokens),
        kv_request_bytes=schema.request_bytes(context),
        kv_page_bytes=schema.page_bytes,
        kv_fixed_per_request=schema.slot_stride,
        kv_fixed_bytes=schema.state_bytes,
        kv_bytes=schema.nbytes,
        kv_growth=growth_per_token(config, index_keys),
        total_bytes=weights + schema.nbytes,
        memory_bytes=memory_bytes,
        largest_context=largest,
    )


def weight_bytes_per_gpu(config: ModelConfig, specs: Iterable[TensorSpec], gpus: int) -> int:
    """Bytes of `specs` on the fullest of `gpus`, divided as `plan` says."""
    experts = divided = replicated = 0
    for s in specs:
        parts = s.name.split(".")
        if "experts" in parts:
            experts += s.nbytes
        elif any(p in DIVIDED for p in parts):
            divided += s.nbytes
        else:
            replicated += s.nbytes
    per_expert = experts // config.n_routed_experts  # over all layers; experts are alike
    most = -(-config.n_routed_experts // gpus)
    return most * per_expert + -(-divided // gpus) + replicated


def _check_arguments(
    config: ModelConfig, gpus: int, context: int, batch: int, memory_bytes: int | None
) -> None:
    limit = config.max_position_embeddings
    for name, value, high in (
        ("gpus", gpus, 1 << 16),
        ("context", context, limit),
        ("batch", batch, 1 << 20),
        ("memory_bytes", memory_bytes, 1 << 60),
    ):
        if name == "memory_bytes" and value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= high:
            raise RequestError(name, f"an integer from 1 to {high:,}", value)
