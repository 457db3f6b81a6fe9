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


class TrainingModel(nn.Module):
    """The trunk. `dtype` is that of the expert products, bfloat16 under autocast."""

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

    def hidden(self, ids: Tensor, switches: Switches) -> tuple[Tensor, Losses]:
        """ids [B, T] -> the vectors the head reads [B, T, D], and the auxiliary losses."""
        key = (ids.shape[1], ids.device)
        if key not in self._tables:
            self._tables[key] = make_tables(self.config, *key)
        x = self.embed(ids).unsqueeze(2).expand(-1, -1, self.config.hc_mult, -1)
        losses = Losses(x.new_zeros(()), x.new_zeros(()))
        for layer in self.layers:
            x, indexer, balance, load = layer(x, ids, self._tables[key], switches, self.dtype)
            losses.indexer = losses.indexer + indexer
            losses.balance = losses.balance + balance
            losses.loads.append(load)
        mix = (self.hc_head_fn, self.hc_head_scale, self.hc_head_base)
        return self.norm(mhc_collapse(x, *mix, self.config)), losses

    def forward(self, ids: Tensor, switches: Switches | None = None) -> tuple[Tensor, Losses]:
        """ids [B, T] -> logits [B, T, V] and the auxiliary losses."""
        hidden, losses = self.hidden(ids, switches or Switches())
        return self.head(hidden), losses

    def update_router_bias(self, loads: list[Tensor], speed: float) -> None:
        """One step of loss-free balancing in every score layer."""
        for layer, load in zip(self.layers, loads, strict=True):
            layer.ffn.update_bias(load, speed)
