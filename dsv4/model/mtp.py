"""The MTP block: drafts the token after the next one."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from dsv4.cache.storage import LayerViews
from dsv4.core.config import LayerKind, ModelConfig
from dsv4.layers.batch import Batch
from dsv4.layers.indexer import IndexerForm
from dsv4.layers.linear import Fp8Linear, WideLinear
from dsv4.layers.mhc import Head
from dsv4.layers.weights import DeviceWeights
from dsv4.model.block import Block, run_blocks
from dsv4.ops.embedding import embed_streams
from dsv4.ops.norm import rms_norm


@dataclass(frozen=True)
class MtpBlock:
    """A block of SWA over the trunk's streams and the embedding of the token that follows.

    X_j = W^E RMSNorm(embed(id_{t+1})) + W^H RMSNorm(X_last,j);  logits of t + 2
    """

    config: ModelConfig
    embedding: Tensor
    enorm: Tensor
    hnorm: Tensor
    e_proj: Fp8Linear
    h_proj: Fp8Linear
    block: Block
    head: Head
    lm_head: WideLinear

    @classmethod
    def of(
        cls, config: ModelConfig, weights: DeviceWeights, form: IndexerForm,
        unfused: Collection[str] = (),
    ) -> MtpBlock:  # fmt: skip
        """Block 0 of a model whose weights were loaded with it."""
        w, trunk = weights.view.at("mtp.0"), weights.view
        block = Block.of(config, LayerKind.SWA, w, form, "mtp.0", unfused)
        e_proj, h_proj = (Fp8Linear.of(w.fp8(name)) for name in ("e_proj", "h_proj"))
        return cls(
            config, trunk["embed.weight"], w["enorm.weight"], w["hnorm.weight"], e_proj, h_proj,
            block, Head.of(config, w), WideLinear.of(trunk, "head"),
        )  # fmt: skip

    @torch.inference_mode()
    def streams(self, streams: Tensor, next_ids: Tensor, batch: Batch, cache: LayerViews) -> Tensor:
        """Rows of a step: trunk streams [T, N, D] and the ids that follow [T] -> [T, N, D]"""
        eps = self.config.rms_norm_eps
        embedded = embed_streams(next_ids, self.embedding, 1).flatten(1)
        e = self.e_proj(rms_norm(embedded, self.enorm, eps))
        h = self.h_proj(rms_norm(streams, self.hnorm, eps).flatten(0, 1))
        x = e[:, None] + h.view(streams.shape)
        return run_blocks([self.block], x, batch, [cache])

    @torch.inference_mode()
    def logits(self, streams: Tensor) -> Tensor:
        """streams [T, N, D] -> [T, V] FP32, of the tokens after the next ones"""
        return self.lm_head(self.head(streams))
