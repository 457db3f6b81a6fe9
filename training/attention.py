"""Attention for training: window in blocks, compressed entries as dense masked scores."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsv4.core.config import LayerKind, ModelConfig
from dsv4.reference.quant import hadamard, simulate_fp8, simulate_mxfp4
from dsv4.reference.rope import layer_frequencies

KV_NORM_INIT = 2.0  # |logit| <= sqrt(C) |kv_norm|: 2 lets retrieval over many entries be sharp
KV_GROUP = 64


@dataclass(frozen=True)
class Switches:
    """What a forward pass computes.

    sparse         CSA sees the indexer's top-k entries only; otherwise all visible ones
    indexer_loss   compute the KL loss that trains the indexer
    round_cache    straight-through rounding of keys to FP8 and indexer vectors to MXFP4
    without_csa, without_hca  [B] rows that see no entries in layers of that kind
    """

    sparse: bool = True
    indexer_loss: bool = False
    round_cache: bool = False
    without_csa: Tensor | None = None
    without_hca: Tensor | None = None


@dataclass(frozen=True)
class Tables:
    """Masks and rotary tables of one sequence length, all on the device.

    rope     kind -> (cos, sin) [T, R/2]; local_hidden [T / W, W, 2 W] True where a window key is
             not visible; hidden: kind -> [T, S] True where an entry is not visible
    """

    rope: dict[LayerKind, tuple[Tensor, Tensor]]
    local_hidden: Tensor
    hidden: dict[LayerKind, Tensor]


def make_tables(config: ModelConfig, length: int, device: torch.device) -> Tables:
    """Tables for sequences of `length` tokens. Raises ValueError unless it is a multiple of 128."""
    W = config.sliding_window
    if length % W or length % LayerKind.HCA.ratio:
        raise ValueError(f"length: expected a multiple of {W} and 128, got {length}")
    position = torch.arange(length, device=device)
    rope = {}
    for kind in LayerKind:
        angle = position.float()[:, None] * layer_frequencies(config, kind).to(device)
        rope[kind] = (angle.cos(), angle.sin())
    row, column = torch.arange(W, device=device)[:, None], torch.arange(2 * W, device=device) - W
    visible = (column <= row) & (column > row - W)
    local = visible.expand(length // W, W, 2 * W).clone()
    local[0, :, :W] = False
    hidden = {
        kind: torch.arange(length // kind.ratio, device=device)
        >= ((position + 1) // kind.ratio)[:, None]
        for kind in (LayerKind.CSA, LayerKind.HCA)
    }  # fmt: skip
    return Tables(rope, ~local, hidden)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE on the last dims, interleaved pairs; x [B, T, ..., C], cos and sin [T, R/2]."""
    shape = (cos.shape[0], *(1,) * (x.dim() - 3), cos.shape[1])
    cos, sin = cos.view(shape), sin.view(shape)
    nope, rope = x.split([x.shape[-1] - 2 * cos.shape[-1], 2 * cos.shape[-1]], -1)
    a, b = rope.float().unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)
    return torch.cat((nope, turned.to(x.dtype)), -1)


def _straight_through(x: Tensor, rounded: Tensor) -> Tensor:
    return x + (rounded - x).detach()


def round_key(x: Tensor, rope_dim: int) -> Tensor:
    """FP8 rounding of the nope dims, straight through."""
    nope, rope = x.split([x.shape[-1] - rope_dim, rope_dim], -1)
    return torch.cat((_straight_through(nope, simulate_fp8(nope.detach(), KV_GROUP)), rope), -1)


def round_index(x: Tensor) -> Tensor:
    """Hadamard rotation and MXFP4 rounding, straight through."""
    x = hadamard(x)
    return _straight_through(x, simulate_mxfp4(x.detach()))


class RMSNorm(nn.Module):
    """RMSNorm with a weight, in FP32."""

    def __init__(self, width: int, eps: float, init: float = 1.0) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.full((width,), init)), eps

    def forward(self, x: Tensor) -> Tensor:
        """x [..., width] -> same shape and dtype."""
        y = x.float()
        y = y * (y.square().mean(-1, keepdim=True) + self.eps).rsqrt()
        return (y * self.weight).to(x.dtype)


class Compressor(nn.Module):
    """Pools windows of tokens into entries of width `width`."""

    def __init__(self, config: ModelConfig, kind: LayerKind, width: int, norm_init: float) -> None:
        super().__init__()
        halves = 2 if kind is LayerKind.CSA else 1
        self.kind, self.width = kind, width
        self.wkv = nn.Linear(config.hidden_size, halves * width, bias=False)
        self.wgate = nn.Linear(config.hidden_size, halves * width, bias=False)
        self.ape = nn.Parameter(torch.zeros(kind.ratio, halves * width))
        self.norm = RMSNorm(width, config.rms_norm_eps, norm_init)

    def forward(self, x: Tensor, tables: Tables) -> Tensor:
        """x [B, T, D] -> entries [B, T / ratio, width], normalised and rotated."""
        ratio, d = self.kind.ratio, self.width
        kappa = self.wkv(x).float().unflatten(1, (-1, ratio))
        gamma = self.wgate(x).float().unflatten(1, (-1, ratio)) + self.ape
        if self.kind is LayerKind.CSA:  # first half of the channels: role in the next window
            before, none = kappa[:, :-1, :, :d], float("-inf")
            kappa = torch.cat((F.pad(before, (0, 0, 0, 0, 1, 0)), kappa[..., d:]), 2)
            before = F.pad(gamma[:, :-1, :, :d], (0, 0, 0, 0, 1, 0), value=none)
            gamma = torch.cat((before, gamma[..., d:]), 2)
        entries = self.norm((gamma.softmax(2) * kappa).sum(2))
        cos, sin = tables.rope[self.kind]
        return rotate(entries, cos[::ratio], sin[::ratio])


class Indexer(nn.Module):
    """Scores entries for queries; its inputs are detached, only the KL loss trains it."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads, self.width = config.index_n_heads, config.index_head_dim
        self.wq_b = nn.Linear(config.q_lora_rank, self.heads * self.width, bias=False)
        self.weights_proj = nn.Linear(config.hidden_size, self.heads, bias=False)
        self.compressor = Compressor(config, LayerKind.CSA, self.width, 1.0)

    def forward(self, x: Tensor, latent: Tensor, tables: Tables, round_cache: bool) -> Tensor:
        """x [B, T, D], latent [B, T, L] -> scores [B, T, S] FP32."""
        keys = self.compressor(x, tables)
        q = self.wq_b(latent).unflatten(-1, (self.heads, self.width))
        q = rotate(q, *tables.rope[LayerKind.CSA])
        if round_cache:
            q, keys = round_index(q.float()), round_index(keys.float())
        head_weights = self.weights_proj(x).float() * (self.heads * self.width) ** -0.5
        scores = torch.einsum("bthj,bsj->bths", q, keys.to(q.dtype)).float().relu()
        return (scores * head_weights.unsqueeze(-1)).sum(2)


def indexer_kl(scores: Tensor, joint: Tensor, hidden: Tensor) -> Tensor:
    """KL from the attention over all entries to the indexer's distribution.

    scores [B, T, S] of the indexer, joint [B, T, S] head-mean attention mass on the entries under
    the joint softmax of window, entries and sink (detached), hidden [T, S].
    Queries weigh by their mass on entries, with a floor of 0.02.
    """
    mass = joint.sum(-1)
    teacher = joint / mass.clamp_min(1e-9).unsqueeze(-1)
    student = scores.masked_fill(hidden, -1e30).log_softmax(-1)
    kl = (teacher * (teacher.clamp_min(1e-9).log() - student)).masked_fill(hidden, 0).sum(-1)
    weight = mass.clamp_min(0.02) * (~hidden).any(-1)
    return (kl * weight).sum() / weight.sum().clamp_min(1e-6)


class Attention(nn.Module):
    """SWA, CSA or HCA attention over whole sequences."""

    def __init__(self, config: ModelConfig, kind: LayerKind) -> None:
        super().__init__()
        c, H, C = config, config.num_attention_heads, config.head_dim
        self.config, self.kind = c, kind
        self.wq_a = nn.Linear(c.hidden_size, c.q_lora_rank, bias=False)
        self.q_norm = RMSNorm(c.q_lora_rank, c.rms_norm_eps)
        self.wq_b = nn.Linear(c.q_lora_rank, H * C, bias=False)
        self.wkv = nn.Linear(c.hidden_size, C, bias=False)
        self.kv_norm = RMSNorm(C, c.rms_norm_eps, KV_NORM_INIT)
        self.wo_a = nn.Linear(H * C // c.o_groups, c.o_groups * c.o_lora_rank, bias=False)
        self.wo_b = nn.Linear(c.o_groups * c.o_lora_rank, c.hidden_size, bias=False)
        self.attn_sink = nn.Parameter(torch.zeros(H))
        if kind is not LayerKind.SWA:
            self.compressor = Compressor(c, kind, C, KV_NORM_INIT)
        if kind is LayerKind.CSA:
            self.indexer = Indexer(c)

    def forward(self, x: Tensor, tables: Tables, switches: Switches) -> tuple[Tensor, Tensor]:
        """x [B, T, D] -> output [B, T, D] and the indexer's loss (zero if none)."""
        c, scale = self.config, self.config.head_dim**-0.5
        B, T, _ = x.shape
        H, W = c.num_attention_heads, c.sliding_window
        cos, sin = tables.rope[self.kind]
        latent = self.q_norm(self.wq_a(x))
        q = self.wq_b(latent).unflatten(-1, (H, -1))
        q = q * (q.float().square().mean(-1, keepdim=True) + c.rms_norm_eps).rsqrt().to(q.dtype)
        q = rotate(q, cos, sin)
        kv = self.kv_norm(self.wkv(x))
        kv = rotate(kv, cos, sin)
        if switches.round_cache:
            kv = round_key(kv, c.qk_rope_head_dim)
        block = kv.unflatten(1, (-1, W))
        keys = torch.cat((F.pad(block[:, :-1], (0, 0, 0, 0, 1, 0)), block), 2)  # [B, T/W, 2W, C]
        local = torch.einsum("bnqhc,bnkc->bnqhk", q.unflatten(1, (-1, W)), keys).float() * scale
        local = local.masked_fill(tables.local_hidden[:, :, None], float("-inf")).flatten(1, 2)
        sink = self.attn_sink.view(1, 1, H, 1).expand(B, T, H, 1)
        entries, dense, loss = None, local[..., :0], x.new_zeros(())
        if self.kind is not LayerKind.SWA:
            entries = self.compressor(x, tables)
            if switches.round_cache:
                entries = round_key(entries, c.qk_rope_head_dim)
            entries = entries.to(q.dtype)
            dense = torch.einsum("bthc,bsc->bths", q, entries).float() * scale
            dense = dense.masked_fill(tables.hidden[self.kind][:, None], float("-inf"))
        if self.kind is LayerKind.HCA and switches.without_hca is not None:
            dense = dense.masked_fill(switches.without_hca[:, None, None, None], float("-inf"))
        if self.kind is LayerKind.CSA:
            dense, loss = self._select(x, latent, local, dense, sink, tables, switches)
        p = torch.cat((local, dense, sink), -1).softmax(-1).to(q.dtype)
        near = p[..., : 2 * W].unflatten(1, (-1, W))
        o = torch.einsum("bnqhk,bnkc->bnqhc", near, keys).flatten(1, 2)
        if entries is not None:
            o = o + torch.einsum("bths,bsc->bthc", p[..., 2 * W : -1], entries)
        o = rotate(o, cos, -sin).flatten(2).unflatten(-1, (c.o_groups, -1))
        z = torch.einsum("btgi,goi->btgo", o, self.wo_a.weight.unflatten(0, (c.o_groups, -1)))
        return self.wo_b(z.flatten(2)), loss

    def _select(
        self, x: Tensor, latent: Tensor, local: Tensor, dense: Tensor, sink: Tensor,
        tables: Tables, switches: Switches,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Entry logits reduced to the indexer's top-k, and the indexer's loss."""
        hidden = tables.hidden[LayerKind.CSA]
        loss = x.new_zeros(())
        if switches.without_csa is not None:
            dense = dense.masked_fill(switches.without_csa[:, None, None, None], float("-inf"))
        scores = self.indexer(x.detach(), latent.detach(), tables, switches.round_cache)
        if switches.indexer_loss:
            with torch.no_grad():
                total = torch.cat((local, dense, sink), -1).logsumexp(-1, keepdim=True)
                joint = (dense - total).exp().mean(2)
            loss = indexer_kl(scores, joint, hidden)
        if switches.sparse:
            k = min(self.config.index_topk, scores.shape[-1])
            best = scores.detach().masked_fill(hidden, float("-inf")).topk(k, -1).indices
            dropped = torch.ones_like(scores, dtype=torch.bool).scatter_(-1, best, False)
            dense = dense.masked_fill(dropped.unsqueeze(2), float("-inf"))
        return dense, loss
