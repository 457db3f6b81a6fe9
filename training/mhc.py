"""mHC for training: the mixes of a sub-layer, and the collapse before the head."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dsv4.core.config import ModelConfig

COMB_DIAGONAL = 3.0  # comb starts near the identity: softmax(3, 0, 0, 0) keeps 0.87 of a stream


def _mixes(x: Tensor, fn: Tensor, eps: float) -> Tensor:
    flat = x.flatten(-2).float()
    rho = (flat.square().mean(-1, keepdim=True) + eps).rsqrt()
    return (flat @ fn.T) * rho


def sinkhorn(comb: Tensor, iters: int, eps: float) -> Tensor:
    """Softmax over rows, then alternate column and row normalisations; [..., N, N] -> same."""
    comb = comb.softmax(-1) + eps
    comb = comb / (comb.sum(-2, keepdim=True) + eps)
    for _ in range(iters - 1):
        comb = comb / (comb.sum(-1, keepdim=True) + eps)
        comb = comb / (comb.sum(-2, keepdim=True) + eps)
    return comb


def _join(o: Tensor, x: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    mixed = sum(comb[..., j, :, None] * x[..., j, None, :] for j in range(x.shape[-2]))
    return post.unsqueeze(-1) * o.float().unsqueeze(-2) + mixed


def _collapse(x: Tensor, pre: Tensor) -> Tensor:
    return (pre.unsqueeze(-1) * x).sum(-2)


_STREAMS = {"join": _join, "collapse": _collapse}


def compile_streams() -> None:
    """Fuse the element-wise work on the four streams, the largest part of an eager step."""
    torch._dynamo.config.recompile_limit = 64  # one graph for each shape of a batch
    for name, function in list(_STREAMS.items()):
        _STREAMS[name] = torch.compile(function, dynamic=False)


def initial_base(config: ModelConfig, sublayer: int) -> Tensor:
    """Biases that give each sub-layer a stream of its own to read and write.

    Equal streams would stay equal and comb would carry nothing, so sub-layer i starts out reading
    and writing stream i mod N, and comb starts near the identity. -> [N (N + 2)]
    """
    n = config.hc_mult
    pre, post = torch.full((n,), -1.0), torch.full((n,), -1.5)
    pre[sublayer % n], post[sublayer % n] = 1.0, 1.5
    return torch.cat((pre, post, (torch.eye(n) * COMB_DIAGONAL).flatten()))


def mhc_split(
    x: Tensor, fn: Tensor, scale: Tensor, base: Tensor, config: ModelConfig
) -> tuple[Tensor, Tensor, Tensor]:
    """Streams x [B, T, N, D] -> sub-layer input [B, T, D], post [B, T, N], comb [B, T, N, N]."""
    n = config.hc_mult
    with torch.autocast(x.device.type, enabled=False):
        pre, post, comb = _mixes(x, fn, config.rms_norm_eps).split([n, n, n * n], -1)
        pre_base, post_base, comb_base = base.split([n, n, n * n])
        pre = (pre * scale[0] + pre_base).sigmoid() + config.hc_eps
        post = 2 * (post * scale[1] + post_base).sigmoid()
        comb = (comb * scale[2] + comb_base).unflatten(-1, (n, n))
        comb = sinkhorn(comb, config.hc_sinkhorn_iters, config.hc_eps)
        return _STREAMS["collapse"](x, pre), post, comb


def mhc_join(o: Tensor, x: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    """X'_k = post_k o + sum_j comb_jk X_j; o [B, T, D], x [B, T, N, D] -> [B, T, N, D]."""
    with torch.autocast(x.device.type, enabled=False):
        return _STREAMS["join"](o, x, post, comb)


def mhc_collapse(x: Tensor, fn: Tensor, scale: Tensor, base: Tensor, config: ModelConfig) -> Tensor:
    """The weighted sum of the streams that the head reads; x [B, T, N, D] -> [B, T, D]."""
    with torch.autocast(x.device.type, enabled=False):
        mixes = _mixes(x, fn, config.rms_norm_eps)
        pre = (mixes * scale + base).sigmoid() + config.hc_eps
        return _STREAMS["collapse"](x, pre)


def register_mhc(owner: nn.Module, name: str, config: ModelConfig, sublayer: int) -> None:
    """Give `owner` the parameters NAME_fn, NAME_scale and NAME_base, the official flat names."""
    n = config.hc_mult
    fn = torch.randn(n * (n + 2), n * config.hidden_size) * 0.01
    owner.register_parameter(f"{name}_fn", nn.Parameter(fn))
    owner.register_parameter(f"{name}_scale", nn.Parameter(torch.ones(3)))
    owner.register_parameter(f"{name}_base", nn.Parameter(initial_base(config, sublayer)))
