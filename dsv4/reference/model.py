"""Tier 1: the whole model on the oracles, one sequence at a time."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dsv4.core.config import LayerKind, ModelConfig
from dsv4.core.errors import RequestError
from dsv4.core.formats import BlockScaledTensor
from dsv4.core.taps import tap
from dsv4.reference.cache import LayerCache, ModelCache
from dsv4.reference.head import lm_head
from dsv4.reference.layer import Layer
from dsv4.reference.mhc import hc_head
from dsv4.reference.mtp import mtp_input
from dsv4.reference.simulation import QuantSimulation
from dsv4.reference.weights import Weights

DTYPES = (torch.float64, torch.float32, torch.bfloat16)


class ReferenceModel:
    """DeepSeek-V4 in plain PyTorch.

        X = repeat(embed(ids), N);  X = layer_j(X), j = 0 .. L - 1
        logits = W^head RMSNorm(hc_head(X))                                   (paper sec. 2)

    config    what the checkpoint is
    weights   official name -> Tensor or BlockScaledTensor, as `Checkpoint.load` returns
    dtype     activations and GEMM weights: float64, float32 or bfloat16. Norms, mHC, softmax,
              router, compressor and LM head run in FP32 (FP64 with float64)
    simulate  roundings of the quantised runtime to imitate; none by default
    keep_packed  keep routed experts quantised in memory and dequantise them at every use
    device    where it computes; ids are given there too

    Raises ValueError for another dtype.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: Mapping[str, Tensor | BlockScaledTensor],
        dtype: torch.dtype = torch.float32,
        simulate: QuantSimulation | None = None,
        keep_packed: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:
        if dtype not in DTYPES:
            raise ValueError(f"dtype: expected one of {DTYPES}, got {dtype}")
        simulate = simulate or QuantSimulation()
        self.config, self.dtype, self.device = config, dtype, torch.device(device)
        self.weights = w = Weights(weights, dtype, keep_packed, device)
        self.layers = [
            Layer(config, config.layer_kind(j), config.is_hash_layer(j), w.at(name), simulate, name)
            for j in range(config.num_hidden_layers)
            for name in (f"layers.{j}",)
        ]
        self.mtp = [
            Layer(config, LayerKind.SWA, False, w.at(name), simulate, name)
            for j in range(config.num_nextn_predict_layers)
            for name in (f"mtp.{j}",)
            if f"{name}.enorm.weight" in w
        ]

    def new_cache(self) -> ModelCache:
        """An empty cache for one sequence."""

        def empty(layer: Layer) -> LayerCache:
            return LayerCache.empty(self.config, layer.kind, self.dtype, self.device)

        return ModelCache([empty(x) for x in self.layers], [empty(x) for x in self.mtp])

    @torch.inference_mode()
    def forward_streams(self, ids: Tensor, cache: ModelCache) -> Tensor:
        """Run T more tokens through the trunk. Prefill, chunked prefill and decode are this call.

        ids [T] int64, cache grows by T -> streams [T, N, D] after the last layer
        Raises RequestError for ids outside the vocabulary or a context that grows too long.
        """
        self._check_ids(ids, cache.length)
        x = self.weights["embed.weight"][ids]
        x = x[:, None, :].expand(-1, self.config.hc_mult, -1)
        for layer, layer_cache in zip(self.layers, cache.layers, strict=True):
            x = layer.forward(x, ids, layer_cache)
        return x

    @torch.inference_mode()
    def logits(self, streams: Tensor) -> Tensor:
        """LM head of the trunk: streams [T, N, D] -> logits [T, V] FP32."""
        out = self._head(streams, "")
        tap("logits", out)
        return out

    def forward(self, ids: Tensor, cache: ModelCache, last_only: bool = False) -> Tensor:
        """Logits of T more tokens.

        ids [T] int64, cache grows by T -> [T, V] FP32 (FP64), or [1, V] of the last token only
        """
        streams = self.forward_streams(ids, cache)
        return self.logits(streams[-1:] if last_only else streams)

    @torch.inference_mode()
    def forward_mtp(
        self, streams: Tensor, next_ids: Tensor, cache: ModelCache, block: int = 0
    ) -> Tensor:
        """Draft logits of an MTP block for the tokens after the next ones.

        streams  [T, N, D] of the trunk at positions t
        next_ids [T] int64, the tokens at t + 1
        ->       [T, V] FP32, logits for positions t + 2; the block's own cache grows by T
        Raises RequestError if the checkpoint has no such block.
        """
        if not 0 <= block < len(self.mtp):
            raise RequestError("block", f"0 to {len(self.mtp) - 1} (MTP blocks loaded)", block)
        self._check_ids(next_ids, cache.mtp[block].length)
        layer, w = self.mtp[block], self.weights.at(f"mtp.{block}")
        x = mtp_input(
            streams, self.weights["embed.weight"][next_ids], w["enorm.weight"], w["hnorm.weight"],
            w["e_proj.weight"], w["h_proj.weight"], self.config.rms_norm_eps,
            layer.simulate.activations,
        )  # fmt: skip
        x = layer.forward(x, next_ids, cache.mtp[block])
        out = self._head(x, f"mtp.{block}")
        tap(f"mtp.{block}.logits", out)
        return out

    def _head(self, streams: Tensor, prefix: str) -> Tensor:
        w, c = self.weights.at(prefix) if prefix else self.weights, self.config
        fn, scale, base = (w[f"hc_head_{part}"] for part in ("fn", "scale", "base"))
        y = hc_head(streams, fn, scale, base, c.rms_norm_eps, c.hc_eps)
        return lm_head(y, w["norm.weight"], self.weights["head.weight"], c.rms_norm_eps)

    def _check_ids(self, ids: Tensor, length: int) -> None:
        V, limit = self.config.vocab_size, self.config.max_position_embeddings
        if ids.dim() != 1 or ids.dtype != torch.int64:
            raise RequestError("ids", "int64 [T]", f"{ids.dtype} {list(ids.shape)}")
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < V:
            raise RequestError("ids", f"0 to {V - 1}", f"{int(ids.min())} to {int(ids.max())}")
        if length + len(ids) > limit:
            raise RequestError("ids", f"at most {limit} positions", length + len(ids))
