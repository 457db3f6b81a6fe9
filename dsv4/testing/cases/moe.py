"""Inputs of the routed experts: random weights, tokens and routing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Generator, Tensor

from dsv4.core.expert_tiles import COLUMNS, ROWS, from_tiles, to_tiles
from dsv4.testing.cases.linear import fp8_weight

GROUPS = {"mxfp4": 32, "nvfp4": 16}
LIMIT = 10.0


@dataclass(frozen=True)
class MoeCase:
    """Arguments of moe_routed; weights are random bytes of a trained model's magnitude."""

    x: Tensor
    ids: Tensor
    routing: Tensor
    weights: tuple[Tensor, ...]  # w1, s1, w3, s3, w2, s2, in tiles
    global_scale: Tensor | None
    shared: Tensor | None
    format: str
    first_expert: int = 0
    limit: float = LIMIT

    @classmethod
    def random(
        cls, T: int, D: int, F: int, E: int, K: int = 6, format: str = "mxfp4",
        has_shared: bool = True, device: str = "cpu", seed: int = 0,
    ) -> MoeCase:  # fmt: skip
        """Distinct experts for every token, uniform."""
        g = Generator(device).manual_seed(seed)
        group, is_nvfp4 = GROUPS[format], format == "nvfp4"
        # Weights of about 1 / sqrt(inputs): E2M1 codes have a root mean square of 2.9.
        low, high = (0x14, 0x2C) if is_nvfp4 else (117, 121)

        def stored(rows: int, cols: int) -> tuple[Tensor, Tensor]:
            shape = E, rows // ROWS, cols // COLUMNS, ROWS, COLUMNS // 2
            codes = torch.randint(0, 256, shape, generator=g, dtype=torch.uint8, device=device)
            shape = *shape[:-1], COLUMNS // group
            scales = torch.randint(low, high, shape, generator=g, dtype=torch.uint8, device=device)
            return codes, scales

        weights = *stored(F, D), *stored(F, D), *stored(D, F)
        ids = torch.rand(T, E, generator=g, device=device).topk(K, dim=1).indices.to(torch.int32)
        routing = torch.rand(T, K, generator=g, device=device) + 0.1
        scale = 0.25 * (1 + torch.rand(3, E, generator=g, device=device)) if is_nvfp4 else None

        def tokens() -> Tensor:
            return torch.randn(T, D, generator=g, device=device).to(torch.bfloat16)

        shared = tokens() if has_shared else None
        return cls(tokens(), ids, 1.5 * routing / routing.sum(1, True), weights, scale, shared,
                   format)  # fmt: skip

    @property
    def stored(self) -> tuple[Tensor, ...]:
        """The weights as a checkpoint has them: w1, s1, w3, s3, w2, s2, [E, N, B] each."""
        return tuple(from_tiles(w) for w in self.weights)

    def with_stored(self, weights: Sequence[Tensor]) -> MoeCase:
        """The same with other weights as a checkpoint has them."""
        D, F = self.x.shape[1], weights[0].shape[1]
        columns = (D, D, D, D, F, F)
        tiles = [to_tiles(w, n).contiguous() for w, n in zip(weights, columns, strict=True)]
        return replace(self, weights=tuple(tiles))

    def args(self) -> dict[str, Any]:
        """Keyword arguments of the op."""
        names = ("w1", "s1", "w3", "s3", "w2", "s2")
        return {
            "x": self.x, "ids": self.ids, "routing": self.routing,
            **dict(zip(names, self.weights, strict=True)), "global_scale": self.global_scale,
            "shared": self.shared, "limit": self.limit, "first_expert": self.first_expert,
            "format": self.format,
        }  # fmt: skip

    def args_w4a8(self) -> dict[str, Any]:
        """Keyword arguments of the op that rounds tokens to FP8; for MXFP4."""
        return {k: v for k, v in self.args().items() if k not in ("global_scale", "format")}

    def args_with_shared(self, scale_dtype: str = "F8_E8M0") -> dict[str, Any]:
        """Keyword arguments of the op that has the shared expert's weights, not its result."""
        D, F = self.x.shape[1], self.weights[0].shape[1] * ROWS
        device = str(self.x.device)
        gate_up, gate_up_scale = fp8_weight(2 * F, D, scale_dtype, 1, device)
        down, down_scale = fp8_weight(D, F, scale_dtype, 2, device)
        shared = {"gate_up": gate_up, "gate_up_scale": gate_up_scale, "down": down,
                  "down_scale": down_scale, "after_router": False}  # fmt: skip
        return {k: v for k, v in self.args().items() if k != "shared"} | shared

    def wide(self) -> MoeCase:
        """The same in FP64, for the oracle."""
        shared = None if self.shared is None else self.shared.double()
        return replace(self, x=self.x.double(), shared=shared)

    def rows(self, keep: slice) -> MoeCase:
        """Some of the tokens."""
        return replace(
            self, x=self.x[keep].contiguous(), ids=self.ids[keep].contiguous(),
            routing=self.routing[keep].contiguous(),
            shared=None if self.shared is None else self.shared[keep].contiguous(),
        )  # fmt: skip

    @property
    def nbytes(self) -> int:
        """Bytes of the experts hit, each read once, and of the tokens in and out."""
        hit = len(self.ids.unique())
        per_expert = sum(w[0].numel() for w in self.weights)
        return hit * per_expert + 3 * 2 * self.x.numel()


def aot_calls() -> dict[str, dict[str, Any]]:
    """Few experts: their number is a constant of the routing lists alone."""
    calls = {}
    for name in GROUPS:
        case = MoeCase.random(256, 4096, 2048, 8, format=name)
        calls[f"moe_routed/{name}"] = case.rows(slice(2)).args()
        calls[f"moe_routed/{name}, prompt"] = case.args()
        if name == "mxfp4":
            calls["moe_routed_w4a8"] = case.rows(slice(2)).args_w4a8()
            calls["moe_routed_w4a8/prompt"] = case.args_w4a8()
    return calls
