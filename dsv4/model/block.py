"""One block: attention and experts, and the way of the streams through several blocks."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from torch import Tensor

from dsv4.cache.storage import LayerViews
from dsv4.core.config import LayerKind, ModelConfig
from dsv4.core.errors import RequestError
from dsv4.core.taps import tap
from dsv4.layers.attention import Attention
from dsv4.layers.batch import Batch
from dsv4.layers.indexer import IndexerForm
from dsv4.layers.mhc import Mixer, leave
from dsv4.layers.moe import Moe
from dsv4.layers.weights import WeightView

# Steps that can run as their parts.
FUSED = (
    "mhc_post_pre", "latent_kv_norm_pack", "joined_wide_linear", "entry_and_key_insert",
    "cache_step_append", "embed_streams", "q_norm_rope", "index_query_rope",
    "sparse_attn_inverse_rope", "gate_up_swiglu", "moe_routed_shared", "moe_with_shared",
)  # fmt: skip
# Of them, those whose parts give the step's bits at any width. The parts of the others round
# elsewhere or sum in another order: they agree within limits.
EXACT = (
    "entry_and_key_insert", "cache_step_append", "embed_streams", "q_norm_rope", "index_query_rope",
    "moe_with_shared",
)  # fmt: skip


def check_unfused(names: Collection[str]) -> frozenset[str]:
    """The names as a set. Raises RequestError for one that is not in FUSED."""
    for name in names:
        if name not in FUSED:
            raise RequestError("--no-fusion", f"one or more of {', '.join(FUSED)}", name)
    return frozenset(names)


@dataclass(frozen=True)
class Block:
    """One layer: attention and experts, each entered through its mixer.

    name      begins its taps
    is_fused  whether the mixers leave one sub-layer and enter the next at once
    """

    enter_attention: Mixer
    attention: Attention
    enter_experts: Mixer
    experts: Moe
    name: str
    is_fused: bool = True

    @classmethod
    def of(
        cls, config: ModelConfig, kind: LayerKind, w: WeightView, form: IndexerForm, name: str,
        unfused: Collection[str] = (),
    ) -> Block:  # fmt: skip
        """The block whose weights are `w`; `name` is "layers.3" or "mtp.0"."""
        attention = Attention.of(config, kind, w.at("attn"), form, f"{name}.attn", unfused)
        experts = Moe.of(config, w.at("ffn"), f"{name}.ffn", unfused)
        mixers = Mixer.of(config, w, "attn"), Mixer.of(config, w, "ffn")
        is_fused = "mhc_post_pre" not in unfused
        return cls(mixers[0], attention, mixers[1], experts, name, is_fused)


def run_blocks(
    blocks: Sequence[Block], x: Tensor, batch: Batch, caches: Sequence[LayerViews]
) -> Tensor:
    """Streams x [T, N, D] through `blocks`, each with its own of `caches` -> [T, N, D]

    Between two sub-layers one op leaves the first and enters the second.
    """
    y, gains = blocks[0].enter_attention.enter(x)
    for j, block in enumerate(blocks):
        o = block.attention(y, batch, caches[j])
        x, y, gains = block.enter_experts.leave_and_enter(o, x, gains, block.is_fused)
        o = block.experts(y, batch)
        if j + 1 < len(blocks):
            following = blocks[j + 1].enter_attention
            x, y, gains = following.leave_and_enter(o, x, gains, block.is_fused)
        else:
            x = leave(o, x, gains)
        tap(f"{block.name}.streams", x)
    return x
