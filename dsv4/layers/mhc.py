"""What lies between two sub-layers: streams mixed, collapsed and normalised (mHC)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from dsv4.core.config import ModelConfig
from dsv4.layers.weights import WeightView
from dsv4.ops.mhc import hc_head_norm, mhc_post, mhc_post_pre, mhc_pre_norm


@dataclass(frozen=True)
class Gains:
    """How a sub-layer takes its output back into the streams: post [T, N], comb [T, N, N]."""

    post: Tensor
    comb: Tensor


@dataclass(frozen=True)
class Mixer:
    """The way from the streams into one sub-layer.

    fn, scale, base  FP32 weights of the maps
    norm             weight of the sub-layer's RMSNorm
    """

    config: ModelConfig
    fn: Tensor
    scale: Tensor
    base: Tensor
    norm: Tensor

    @classmethod
    def of(cls, config: ModelConfig, w: WeightView, name: str) -> Mixer:
        """`name` "attn" or "ffn" of the block whose weights are `w`."""
        fn, scale, base = (w[f"hc_{name}_{part}"] for part in ("fn", "scale", "base"))
        return cls(config, fn, scale, base, w[f"{name}_norm.weight"])

    def enter(self, x: Tensor) -> tuple[Tensor, Gains]:
        """Streams x [T, N, D] -> the sub-layer's input [T, D], and its gains."""
        y, post, comb, _, _ = mhc_pre_norm(x, *self._args)
        return y, Gains(post, comb)

    def leave_and_enter(
        self, o: Tensor, x: Tensor, gains: Gains, is_fused: bool = True
    ) -> tuple[Tensor, Tensor, Gains]:
        """Write the output o [T, D] of the sub-layer before back, and enter this one.

        -> streams [T, N, D], input [T, D], gains of this sub-layer
        """
        if not is_fused:
            x = leave(o, x, gains)
            return x, *self.enter(x)
        x, y, post, comb, _, _ = mhc_post_pre(o, x, gains.post, gains.comb, *self._args)
        return x, y, Gains(post, comb)

    @property
    def _args(self) -> tuple[Tensor, Tensor, Tensor, Tensor, int, float, float, bool]:
        c = self.config
        rest = c.hc_sinkhorn_iters, c.rms_norm_eps, c.hc_eps, False
        return self.fn, self.scale, self.base, self.norm, *rest


def leave(o: Tensor, x: Tensor, gains: Gains) -> Tensor:
    """Write the output o [T, D] of the last sub-layer back: -> streams [T, N, D]"""
    return mhc_post(o, x, gains.post, gains.comb)


@dataclass(frozen=True)
class Head:
    """The way from the streams to the LM head's input."""

    config: ModelConfig
    fn: Tensor
    scale: Tensor
    base: Tensor
    norm: Tensor

    @classmethod
    def of(cls, config: ModelConfig, w: WeightView) -> Head:
        """Of the trunk."""
        fn, scale, base = (w[f"hc_head_{part}"] for part in ("fn", "scale", "base"))
        return cls(config, fn, scale, base, w["norm.weight"])

    def __call__(self, x: Tensor) -> Tensor:
        """Streams x [T, N, D] -> [T, D]"""
        c = self.config
        return hc_head_norm(x, self.fn, self.scale, self.base, self.norm, c.rms_norm_eps, c.hc_eps)
