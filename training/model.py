"""The training model: DeepSeek-V4 over whole sequences, parameters named as in the checkpoint.

Only the routed experts are stacked ("layers.3.ffn.experts.w1" [E, F, D]); `export` splits them.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn as nn
from torch import Tensor

from dsv4.core.config import ModelConfig
from training.attention import Attention, RMSNorm, Switches, Tables, make_tables
from training.mhc import mhc_collapse, mhc_join, mhc_split, register_mhc
from training.moe import MoE, balanced_hash_table

INIT_STD = 0.02


@dataclass
class Losses:
    """Auxiliary losses of one forward pass, and what the routers did.

    indexer  sum of the KL losses of the CSA layers
    balance  sum of the sequence balance losses of the score layers
    loads    layer -> tokens per expert [E]
    """

    indexer: Tensor
    balance: Tensor
    loads: list[Tensor] = field(default_factory=list)


class Layer(nn.Module):
    """Attention and MoE, each wrapped in mHC."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        self.config = config
        register_mhc(self, "hc_attn", config, 2 * index)
        register_mhc(self, "hc_ffn", config, 2 * index + 1)
        self.attn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.ffn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attn = Attention(config, config.layer_kind(index))
        self.ffn = MoE(config, config.is_hash_layer(index))

    def forward(
        self, x: Tensor, ids: Tensor, tables: Tables, switches: Switches, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x [B, T, N, D], ids [B, T] -> streams, indexer loss, balance loss, expert loads [E]."""
        mix = (self.hc_attn_fn, self.hc_attn_scale, self.hc_attn_base)
        y, post, comb = mhc_split(x, *mix, self.config)
        o, indexer_loss = self.attn(self.attn_norm(y), tables, switches)
        x = mhc_join(o, x, post, comb)
        mix = (self.hc_ffn_fn, self.hc_ffn_scale, self.hc_ffn_base)
        y, post, comb = mhc_split(x, *mix, self.config)
        o, load, balance = self.ffn(self.ffn_norm(y), ids, dtype)
        return mhc_join(o, x, post, comb), indexer_loss, balance, load


class DraftBlock(Layer):
    """An MTP block: joins the trunk's streams with the next token, then an SWA layer."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config, config.num_hidden_layers)
        D, n = config.hidden_size, config.hc_mult
        self.enorm, self.hnorm, self.norm = (RMSNorm(D, config.rms_norm_eps) for _ in range(3))
        self.e_proj, self.h_proj = nn.Linear(D, D, bias=False), nn.Linear(D, D, bias=False)
        self.hc_head_fn = nn.Parameter(torch.randn(n, n * D) * 0.01)
        self.hc_head_scale = nn.Parameter(torch.ones(1))
        self.hc_head_base = nn.Parameter(torch.zeros(n))

    def joined(self, streams: Tensor, embedding: Tensor) -> Tensor:
        """Streams of the trunk [B, T, N, D] and embeddings of the next tokens [B, T, D] -> both."""
        e = self.e_proj(self.enorm(embedding)).unsqueeze(2)
        return (e + self.h_proj(self.hnorm(streams))).float()


class TrainingModel(nn.Module):
    """The trunk, and MTP blocks if the config has any; the trunk's loss never reaches them.

    `dtype` is that of the expert products, bfloat16 under autocast.
    """

    def __init__(self, config: ModelConfig, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.config, self.dtype = config, dtype
        n, width = config.hc_mult, config.hc_mult * config.hidden_size
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.hc_head_fn = nn.Parameter(torch.randn(n, width) * 0.01)
        self.hc_head_scale = nn.Parameter(torch.ones(1))
        self.hc_head_base = nn.Parameter(torch.zeros(n))
        self.mtp = nn.ModuleList(DraftBlock(config) for _ in range(config.num_nextn_predict_layers))
        self._tables: dict[tuple[int, torch.device], Tables] = {}
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
        nn.init.normal_(self.embed.weight, std=1.0)
        nn.init.normal_(self.head.weight, std=INIT_STD)

    def fill_hash_tables(self, frequency: Tensor) -> None:
        """Assign experts to token ids in the hash layers; frequency [V] counts."""
        c = self.config
        for i in range(c.num_hash_layers):
            table = balanced_hash_table(frequency, c.n_routed_experts, c.num_experts_per_tok, i)
            self.layers[i].ffn.gate.tid2eid.copy_(table)

    @torch.no_grad()
    def make_careful(self, raise_sinks: float, traps: tuple[int, float, float]) -> None:
        """Make what behaviour hardly notices matter: sinks and the score bias.

        raise_sinks  added to every sink
        traps        how many more experts of each score layer become noise that scores high and
                     that only its score bias keeps from being chosen; see MoE.set_traps
        """
        rng = torch.Generator().manual_seed(0)
        for layer in self.layers:
            layer.attn.attn_sink += raise_sinks
            if not layer.ffn.gate.is_hash:
                layer.ffn.set_traps(*traps, rng)

    def start_draft(self) -> None:
        """Freeze the trunk, and let the draft head begin as the trunk's."""
        mtp = self.mtp[0]
        with torch.no_grad():
            for name in ("hc_head_fn", "hc_head_scale", "hc_head_base"):
                getattr(mtp, name).copy_(getattr(self, name))
            mtp.norm.weight.copy_(self.norm.weight)
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name.startswith("mtp."))

    def tables(self, ids: Tensor) -> Tables:
        """Masks and rotary tables for rows like ids [B, T]."""
        key = (ids.shape[1], ids.device)
        if key not in self._tables:
            self._tables[key] = make_tables(self.config, *key)
        return self._tables[key]

    def streams(self, ids: Tensor, switches: Switches) -> tuple[Tensor, Losses]:
        """ids [B, T] -> streams after the last layer [B, T, N, D], and the auxiliary losses."""
        tables = self.tables(ids)
        x = self.embed(ids).unsqueeze(2).expand(-1, -1, self.config.hc_mult, -1)
        losses = Losses(x.new_zeros(()), x.new_zeros(()))
        for layer in self.layers:
            x, indexer, balance, load = layer(x, ids, tables, switches, self.dtype)
            losses.indexer = losses.indexer + indexer
            losses.balance = losses.balance + balance
            losses.loads.append(load)
        return x, losses

    def read(self, streams: Tensor) -> Tensor:
        """Streams [B, T, N, D] -> the vectors the head reads [B, T, D]."""
        mix = (self.hc_head_fn, self.hc_head_scale, self.hc_head_base)
        return self.norm(mhc_collapse(streams, *mix, self.config))

    def hidden(self, ids: Tensor, switches: Switches) -> tuple[Tensor, Losses]:
        """ids [B, T] -> the vectors the head reads [B, T, D], and the auxiliary losses."""
        streams, losses = self.streams(ids, switches)
        return self.read(streams), losses

    def draft(self, streams: Tensor, next_ids: Tensor, switches: Switches) -> tuple[Tensor, Tensor]:
        """What the head reads for the tokens after the next ones [B, T, D], and expert loads.

        streams [B, T, N, D] of the trunk at t, next_ids [B, T] the tokens at t + 1
        """
        mtp, ids = self.mtp[0], next_ids
        x = mtp.joined(streams, self.embed(ids))
        x, _, _, load = mtp(x, ids, self.tables(ids), switches, self.dtype)
        mix = (mtp.hc_head_fn, mtp.hc_head_scale, mtp.hc_head_base)
        return mtp.norm(mhc_collapse(x, *mix, self.config)), load

    def forward(self, ids: Tensor, switches: Switches | None = None) -> tuple[Tensor, Losses]:
        """ids [B, T] -> logits [B, T, V] and the auxiliary losses."""
        hidden, losses = self.hidden(ids, switches or Switches())
        return self.head(hidden), losses

    def update_router_bias(self, loads: list[Tensor], speed: float) -> None:
        """One step of loss-free balancing in every score layer."""
        for layer, load in zip(self.layers, loads, strict=True):
            layer.ffn.update_bias(load, speed)
