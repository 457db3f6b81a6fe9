"""Tier 2: the trunk of the model on the ops, for a batch of requests."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from dsv4.cache.storage import CacheStorage
from dsv4.core.config import ModelConfig
from dsv4.core.taps import tap
from dsv4.layers.batch import Batch
from dsv4.layers.indexer import IndexerForm
from dsv4.layers.linear import WideLinear
from dsv4.layers.mhc import Head
from dsv4.layers.weights import DeviceWeights
from dsv4.model.block import Block, check_unfused, run_blocks
from dsv4.ops.embedding import embed_streams


@dataclass(frozen=True)
class Trunk:
    """DeepSeek-V4 without its MTP blocks.

        X = embed(ids) N times;  X = block_j(X);  logits = W^head norm(hc_head(X))

    Between two sub-layers one op leaves the first and enters the second, so the streams are read
    and written once a sub-layer. `unfused` names steps that run as their parts instead.
    """

    config: ModelConfig
    embedding: Tensor
    blocks: tuple[Block, ...]
    head: Head
    lm_head: WideLinear
    unfused: frozenset[str] = frozenset()

    @classmethod
    def of(
        cls, config: ModelConfig, weights: DeviceWeights, form: IndexerForm | None = None,
        unfused: Collection[str] = (),
    ) -> Trunk:  # fmt: skip
        """The trunk whose weights are `weights`; index keys as `form` says (default FP8)."""
        w, form, unfused = weights.view, form or IndexerForm(), check_unfused(unfused)
        blocks = tuple(
            Block.of(config, config.layer_kind(j), w.at(name), form, name, unfused)
            for j in range(config.num_hidden_layers)
            for name in (f"layers.{j}",)
        )
        head, lm_head = Head.of(config, w), WideLinear.of(w, "head")
        return cls(config, w["embed.weight"], blocks, head, lm_head, unfused)

    @torch.inference_mode()
    def streams(self, batch: Batch, storage: CacheStorage) -> Tensor:
        """Run the rows of a step; the cache takes them. -> streams [T, N, D]"""
        n = self.config.hc_mult
        if "embed_streams" in self.unfused:
            x = embed_streams(batch.ids, self.embedding, 1).repeat(1, n, 1)
        else:
            x = embed_streams(batch.ids, self.embedding, n)
        return run_blocks(self.blocks, x, batch, storage.layers)

    @torch.inference_mode()
    def logits(self, streams: Tensor) -> Tensor:
        """streams [T, N, D] -> [T, V] FP32"""
        out = self.lm_head(self.head(streams))
        tap("logits", out)
        return out
