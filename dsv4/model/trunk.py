"""Tier 2: the trunk of the model on the ops, for a batch of requests."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from dsv4.cache.storage import CacheStorage
from dsv4.core.config import ModelConfig
from dsv4.core.errors import RequestError
from dsv4.core.taps import tap
from dsv4.layers.attention import Attention
from dsv4.layers.batch import Batch
from dsv4.layers.indexer import IndexerForm
from dsv4.layers.linear import WideLinear
from dsv4.layers.mhc import Head, Mixer, leave
from dsv4.layers.moe import Moe
from dsv4.layers.weights import DeviceWeights
from dsv4.ops.embedding import embed_streams

FUSED = (
    "mhc_post_pre",
    "latent_kv_norm_pack",
    "joined_wide_linear",
)  # steps that can run as their parts


def check_unfused(names: Collection[str]) -> frozenset[str]:
    """The names as a set. Raises RequestError for one that is not in FUSED."""
    for name in names:
        if name not in FUSED:
            raise RequestError("--unfused", f"of {', '.join(FUSED)}", name)
    return frozenset(names)


@dataclass(frozen=True)
class Block:
    """One layer: attention and experts, each entered through its mixer."""

    enter_attention: Mixer
    attention: Attention
    enter_experts: Mixer
    experts: Moe


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
            Block(
                Mixer.of(config, b, "attn"),
                Attention.of(
                    config, config.layer_kind(j), b.at("attn"), form, f"layers.{j}.attn", unfused
                ),
                Mixer.of(config, b, "ffn"),
                Moe.of(config, b.at("ffn"), f"layers.{j}.ffn"),
            )
            for j in range(config.num_hidden_layers)
            for b in (w.at(f"layers.{j}"),)
        )
        head, lm_head = Head.of(config, w), WideLinear.of(w, "head")
        return cls(config, w["embed.weight"], blocks, head, lm_head, unfused)

    @torch.inference_mode()
    def streams(self, batch: Batch, storage: CacheStorage) -> Tensor:
        """Run the rows of a step; the cache takes them. -> streams [T, N, D]"""
        x = embed_streams(batch.ids, self.embedding, self.config.hc_mult)
        y, gains = self.blocks[0].enter_attention.enter(x)
        is_fused = "mhc_post_pre" not in self.unfused
        for j, block in enumerate(self.blocks):
            o = block.attention(y, batch, storage.layers[j])
            x, y, gains = block.enter_experts.leave_and_enter(o, x, gains, is_fused)
            o = block.experts(y, batch)
            if j + 1 < len(self.blocks):
                following = self.blocks[j + 1].enter_attention
                x, y, gains = following.leave_and_enter(o, x, gains, is_fused)
            else:
                x = leave(o, x, gains)
            tap(f"layers.{j}.streams", x)
        return x

    @torch.inference_mode()
    def logits(self, streams: Tensor) -> Tensor:
        """streams [T, N, D] -> [T, V] FP32"""
        out = self.lm_head(self.head(streams))
        tap("logits", out)
        return out
