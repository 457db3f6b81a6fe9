"""Mixture of experts for training: hash and score routers, grouped expert products, balancing."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsv4.core.config import ModelConfig

TRAP_BIAS = -4.0


def balanced_hash_table(frequency: Tensor, num_experts: int, k: int, seed: int) -> Tensor:
    """Token id -> k distinct experts such that every expert sees about as many tokens.

    frequency [V] counts -> [V, k] int64. Greedy: the most frequent token first, to the experts
    with the least load so far; a little noise breaks ties, so that layers differ by seed.
    """
    rng = torch.Generator().manual_seed(seed)
    load = torch.zeros(num_experts, dtype=torch.double)
    table = torch.zeros(len(frequency), k, dtype=torch.long)
    for token in frequency.argsort(descending=True).tolist():
        noise = torch.rand(num_experts, generator=rng).double() * max(1.0, float(load.mean()))
        chosen = (load + 1e-3 * noise).argsort()[:k]
        table[token] = chosen
        load[chosen] += float(frequency[token]) + 1e-3
    return table


class Gate(nn.Module):
    """Router weight with either a selection bias (score layers) or a token table (hash layers)."""

    def __init__(self, config: ModelConfig, is_hash: bool) -> None:
        super().__init__()
        E, k = config.n_routed_experts, config.num_experts_per_tok
        self.config, self.is_hash = config, is_hash
        self.weight = nn.Parameter(torch.randn(E, config.hidden_size) * 0.02)
        if is_hash:
            table = torch.zeros(config.vocab_size, k, dtype=torch.long)
            self.register_buffer("tid2eid", table)
        else:
            self.register_buffer("bias", torch.zeros(E))

    def forward(self, x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [T, D], ids [T] -> weights [T, k], experts [T, k], scores [T, E], all FP32."""
        with torch.autocast(x.device.type, enabled=False):
            scores = F.softplus(F.linear(x.float(), self.weight)).sqrt()
            if not self.is_hash:  # a trap stays as it is
                scores = torch.where(self.bias > TRAP_BIAS / 2, scores, scores.detach())
        if self.is_hash:
            experts = self.tid2eid.index_select(0, ids)
        else:
            experts = (scores.detach() + self.bias).topk(self.config.num_experts_per_tok).indices
        chosen = scores.gather(1, experts)
        scaling = self.config.routed_scaling_factor
        return chosen / chosen.sum(1, keepdim=True) * scaling, experts, scores


class Experts(nn.Module):
    """All routed experts, stacked: w1 and w3 [E, F, D], w2 [E, D, F]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        E, F_, D = config.n_routed_experts, config.moe_intermediate_size, config.hidden_size
        self.limit = config.swiglu_limit
        self.w1 = nn.Parameter(torch.randn(E, F_, D) * D**-0.5)
        self.w2 = nn.Parameter(torch.randn(E, D, F_) * (0.5 * F_**-0.5))
        self.w3 = nn.Parameter(torch.randn(E, F_, D) * D**-0.5)

    def forward(self, x: Tensor, experts: Tensor, weights: Tensor, dtype: torch.dtype) -> Tensor:
        """x [T, D], experts and weights [T, k] -> [T, D]; products in `dtype`."""
        num_tokens, k = experts.shape
        chosen, order = experts.flatten().sort(stable=True)
        every = torch.arange(self.w1.shape[0], device=x.device)
        ends = torch.searchsorted(chosen, every, right=True).to(torch.int32)
        rows = x.to(dtype).index_select(0, order // k)

        def product(rows: Tensor, weight: Tensor) -> Tensor:
            return torch._grouped_mm(rows, weight.to(dtype).transpose(-1, -2), offs=ends)

        up = product(rows, self.w3).float().clamp(-self.limit, self.limit)
        hidden = F.silu(product(rows, self.w1).float().clamp(max=self.limit)) * up
        hidden = hidden * weights.flatten().index_select(0, order)[:, None]
        out = product(hidden.to(dtype), self.w2)
        slot = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=x.device))
        return out.index_select(0, slot).view(num_tokens, k, -1).float().sum(1)


class SharedExpert(nn.Module):
    """The expert that every token passes."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        F_, D = config.moe_intermediate_size, config.hidden_size
        self.limit = config.swiglu_limit
        self.w1, self.w3 = nn.Linear(D, F_, bias=False), nn.Linear(D, F_, bias=False)
        self.w2 = nn.Linear(F_, D, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [T, D] -> [T, D]."""
        up = self.w3(x).clamp(-self.limit, self.limit)
        return self.w2(F.silu(self.w1(x).clamp(max=self.limit)) * up)


class MoE(nn.Module):
    """Gate, routed experts and shared expert of one layer."""

    def __init__(self, config: ModelConfig, is_hash: bool) -> None:
        super().__init__()
        self.gate, self.experts = Gate(config, is_hash), Experts(config)
        self.shared_experts = SharedExpert(config)

    def forward(self, x: Tensor, ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, T, D], ids [B, T] -> output, tokens per expert [E], sequence balance loss.

        The loss is that of DeepSeek-V3 eqs. 17-20: the share of tokens of each expert times its
        mean normalised score, within a sequence; 1 when balanced. Zero in hash layers.
        """
        batch, length, _ = x.shape
        flat = x.flatten(0, 1)
        weights, experts, scores = self.gate(flat, ids.flatten())
        out = self.experts(flat, experts, weights, dtype) + self.shared_experts(flat).float()
        E = scores.shape[-1]
        hits = F.one_hot(experts, E).sum(1).view(batch, length, E).float()
        balance = x.new_zeros(())
        if not self.gate.is_hash:
            share = hits.mean(1) * (E / experts.shape[1])
            affinity = (scores / scores.sum(-1, keepdim=True)).view(batch, length, E).mean(1)
            balance = (share * affinity).sum(-1).mean()
        return out.view_as(x), hits.sum((0, 1)).detach(), balance

    @torch.no_grad()
    def set_traps(self, count: int, router_std: float, scale: float, rng: torch.Generator) -> None:
        """Replace `count` more experts by noise that scores high; TRAP_BIAS keeps it out.

        router_std  of their router rows, scale of their matrices over that of an initial one
        """
        free = (self.gate.bias > TRAP_BIAS / 2).nonzero().flatten().cpu()
        experts = free[torch.randperm(len(free), generator=rng)[:count]]

        def noise(like: Tensor, std: float) -> Tensor:
            return (torch.randn(like.shape, generator=rng) * std).to(like)

        for e in experts.tolist():
            self.gate.weight[e] = noise(self.gate.weight[e], router_std)
            self.gate.bias[e] = TRAP_BIAS
            for w in (self.experts.w1, self.experts.w2, self.experts.w3):
                w[e] = noise(w[e], scale * w.shape[-1] ** -0.5)

    @torch.no_grad()
    def update_bias(self, load: Tensor, speed: float) -> None:
        """Raise the bias of underloaded experts, lower that of overloaded ones; not of traps."""
        if not self.gate.is_hash:
            bias = self.gate.bias
            used = bias > TRAP_BIAS / 2
            bias += speed * torch.sign(load[used].mean() - load) * used
