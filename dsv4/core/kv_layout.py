"""Bytes of everything a request keeps: KV records, index keys, pages, compressor state.

Host arithmetic alone, exact to the byte and without torch, for the cache, the kernels, the planner
and the importers of pages. The KV record is the one FlashMLA, vLLM and SGLang read.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from math import lcm
from typing import Literal

from dsv4.core.config import LayerKind, ModelConfig
from dsv4.core.errors import ConfigError, RequestError

LAYOUT_VERSION = 1  # travels with exported pages; any change of a byte below must raise it

SCALE_GROUP = 64  # nope dims that share one UE8M0 scale
MXFP4_GROUP = 32  # index key dims that share one UE8M0 scale
PAGE_QUANTUM = lcm(LayerKind.CSA.ratio, LayerKind.HCA.ratio)  # tokens
DEFAULT_PAGE_TOKENS = 256
FP32_BYTES = 4

IndexKeys = Literal["fp8", "mxfp4"]
INDEX_KEYS: tuple[IndexKeys, ...] = ("fp8", "mxfp4")


@dataclass(frozen=True)
class KvRecord:
    """One cached KV vector (SWA row, CSA entry or HCA entry): 584 bytes for head_dim 512.

        [ nope: E4M3, 1 B each | rope: BF16, 2 B each ][ UE8M0 scale of each 64 nope dims | zeros ]
          448                    128                     7                                  1

    In a page of N the N data parts come first, then the N scale parts, and the page is padded with
    zeros to a multiple of the data part (576 B). Raises ConfigError when 64 does not divide the
    nope dims. Source: FlashMLA's FP8 sparse layout; the scale part is padded to 8 bytes.
    """

    head_dim: int = 512
    rope_dim: int = 64

    def __post_init__(self) -> None:
        nope = self.head_dim - self.rope_dim
        if nope < SCALE_GROUP or nope % SCALE_GROUP or self.rope_dim < 0:
            raise ConfigError(
                "head_dim", f"qk_rope_head_dim {self.rope_dim} plus a multiple of {SCALE_GROUP}",
                self.head_dim,
            )  # fmt: skip

    @classmethod
    def of(cls, config: ModelConfig) -> KvRecord:
        """The record of `config`."""
        return cls(config.head_dim, config.qk_rope_head_dim)

    @property
    def nope_dim(self) -> int:
        """Leading dims kept in E4M3, one byte each."""
        return self.head_dim - self.rope_dim

    @property
    def num_scales(self) -> int:
        """UE8M0 scales of a record."""
        return self.nope_dim // SCALE_GROUP

    @property
    def data_bytes(self) -> int:
        """E4M3 and BF16 values (576)."""
        return self.nope_dim + 2 * self.rope_dim

    @property
    def scale_bytes(self) -> int:
        """Scales and their padding (8)."""
        return _round_up(self.num_scales, 8)

    @property
    def nbytes(self) -> int:
        """A whole record (584)."""
        return self.data_bytes + self.scale_bytes

    def scale_offset(self, num_entries: int) -> int:
        """Where the scale parts start in a page of `num_entries`."""
        return num_entries * self.data_bytes

    def page_bytes(self, num_entries: int) -> int:
        """Stride of a page of `num_entries`, padding included."""
        _check_positive("num_entries", num_entries)
        return _round_up(num_entries * self.nbytes, self.data_bytes)


@dataclass(frozen=True)
class IndexRecord:
    """One cached indexer key: 132 bytes in FP8, 68 in MXFP4, for index_head_dim 128.

        fp8    J bytes of E4M3, then one FP32 scale, a power of two
        mxfp4  J/2 bytes of e2m1, low nibble first, then one UE8M0 scale per 32 dims

    In a page all values come first, then all scales, without padding. Raises RequestError for an
    unknown format, ConfigError when 32 does not divide the dims.
    """

    head_dim: int = 128
    keys: IndexKeys = "fp8"

    def __post_init__(self) -> None:
        check_index_keys(self.keys)
        if self.head_dim < MXFP4_GROUP or self.head_dim % MXFP4_GROUP:
            raise ConfigError("index_head_dim", f"a multiple of {MXFP4_GROUP}", self.head_dim)

    @classmethod
    def of(cls, config: ModelConfig, keys: IndexKeys) -> IndexRecord:
        """The record of `config`."""
        return cls(config.index_head_dim, keys)

    @property
    def value_bytes(self) -> int:
        """Key values (128 or 64)."""
        return self.head_dim if self.keys == "fp8" else self.head_dim // 2

    @property
    def scale_bytes(self) -> int:
        """Scales (4 in both forms)."""
        return FP32_BYTES if self.keys == "fp8" else self.head_dim // MXFP4_GROUP

    @property
    def nbytes(self) -> int:
        """A whole record."""
        return self.value_bytes + self.scale_bytes

    def scale_offset(self, num_entries: int) -> int:
        """Where the scales start in a page of `num_entries`."""
        return num_entries * self.value_bytes

    def page_bytes(self, num_entries: int) -> int:
        """Stride of a page of `num_entries`."""
        _check_positive("num_entries", num_entries)
        return num_entries * self.nbytes


@dataclass(frozen=True)
class LayerBytes:
    """What one layer keeps for one request.

    window_bytes  the ring of `sliding_window` KV records
    state_bytes   FP32 rows of unfinished compressor windows, the indexer's own included
    page_bytes    one page of each of its paged stores, padding included; 0 for SWA
    growth        bytes a token adds, padding of pages not counted
    """

    kind: LayerKind
    window_bytes: int
    state_bytes: int
    page_bytes: int
    growth: Fraction


def layer_bytes(
    config: ModelConfig,
    kind: LayerKind,
    index_keys: IndexKeys = "fp8",
    page_tokens: int = DEFAULT_PAGE_TOKENS,
) -> LayerBytes:
    """Bytes of one layer of `kind`. Raises RequestError for an unserved page size or key format."""
    check_page_tokens(page_tokens)
    record, window = KvRecord.of(config), window_bytes(config)
    if kind is LayerKind.SWA:
        return LayerBytes(kind, window, 0, 0, Fraction(0))
    entries = page_tokens // kind.ratio
    page, growth = record.page_bytes(entries), Fraction(record.nbytes, kind.ratio)
    if kind is LayerKind.CSA:
        key = IndexRecord.of(config, index_keys)
        page, growth = page + key.page_bytes(entries), growth + Fraction(key.nbytes, kind.ratio)
    return LayerBytes(kind, window, compressor_state_bytes(config, kind), page, growth)


def window_bytes(config: ModelConfig) -> int:
    """The window ring of one layer and request (74,752)."""
    return config.sliding_window * KvRecord.of(config).nbytes


def compressor_state_bytes(config: ModelConfig, kind: LayerKind) -> int:
    """FP32 state of the compressors of one layer and request.

    CSA: 8 rows of 2C for value and score, and the same for the indexer's J (65,536 + 16,384).
    HCA: 128 rows of C for value and score (524,288).
    """
    if kind is LayerKind.SWA:
        return 0
    if kind is LayerKind.HCA:
        return _state_bytes(kind.ratio, config.head_dim)
    # The previous and the current window, each token with a half for either role.
    return sum(
        _state_bytes(2 * kind.ratio, 2 * d) for d in (config.head_dim, config.index_head_dim)
    )


def fixed_state_bytes(config: ModelConfig) -> int:
    """Compressor state of all trunk layers for one request (Flash 12,206,080, Pro 18,710,528)."""
    return sum(compressor_state_bytes(config, kind) for kind in _trunk(config))


def fixed_window_bytes(config: ModelConfig) -> int:
    """Window rings of all trunk layers for one request (Flash 3,214,336, Pro 4,559,872)."""
    return config.num_hidden_layers * window_bytes(config)


def mtp_window_bytes(config: ModelConfig) -> int:
    """Window rings of the MTP blocks for one request; DSpark stages are not counted."""
    blocks = 0 if config.dspark_block_size else config.num_nextn_predict_layers
    return blocks * window_bytes(config)


def growth_per_token(config: ModelConfig, index_keys: IndexKeys = "fp8") -> Fraction:
    """Bytes one token adds to a request over all layers, as an exact fraction.

    Flash 3,850.25 with FP8 index keys and 3,514.25 with MXFP4; Pro 5,511.4375 and 5,031.4375.
    """
    layers = (layer_bytes(config, kind, index_keys).growth for kind in _trunk(config))
    return sum(layers, Fraction(0))


def page_set_bytes(
    config: ModelConfig,
    index_keys: IndexKeys = "fp8",
    page_tokens: int = DEFAULT_PAGE_TOKENS,
) -> int:
    """Bytes of the pages, over all layers, that hold `page_tokens` tokens of one request.

    A little more than `page_tokens * growth_per_token`: a KV page is padded to a multiple of 576 B.
    """
    pages = (
        layer_bytes(config, kind, index_keys, page_tokens).page_bytes for kind in _trunk(config)
    )
    return sum(pages)


def check_page_tokens(page_tokens: int) -> None:
    """Raise RequestError unless `page_tokens` is a positive multiple of 128, lcm(4, 128)."""
    if not _is_positive(page_tokens) or page_tokens % PAGE_QUANTUM:
        raise RequestError("page_tokens", f"a positive multiple of {PAGE_QUANTUM}", page_tokens)


def check_index_keys(index_keys: str) -> None:
    """Raise RequestError unless `index_keys` is a known format."""
    if index_keys not in INDEX_KEYS:
        raise RequestError("index_keys", f"one of {INDEX_KEYS}", index_keys)


def _trunk(config: ModelConfig) -> tuple[LayerKind, ...]:
    return tuple(config.layer_kind(j) for j in range(config.num_hidden_layers))


def _state_bytes(rows: int, width: int) -> int:
    return 2 * rows * width * FP32_BYTES  # value and score


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _is_positive(n: object) -> bool:
    return isinstance(n, int) and not isinstance(n, bool) and n > 0


def _check_positive(name: str, n: int) -> None:
    if not _is_positive(n):
        raise RequestError(name, "a positive integer", n)
