"""The feed-forward half of a block: router, routed experts, shared expert."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import pad, silu

from dsv4.core.config import ModelConfig
from dsv4.core.taps import tap
from dsv4.kernels.common.linear_weights import join_rows
from dsv4.layers.batch import Batch
from dsv4.layers.linear import Fp8Linear, WideLinear
from dsv4.layers.weights import ExpertStack, WeightView
from dsv4.ops.activation import gate_up_swiglu
from dsv4.ops.moe import moe_routed, moe_with_shared
from dsv4.ops.router import router_hash, router_topk

JOINED = {"moe_with_shared", "gate_up_swiglu", "moe_routed_shared"}  # one launch where one row is
FEW_ROWS = 64  # up to which the op takes its kernels for few rows


@dataclass(frozen=True)
class Router:
    """Which experts see a token, and with what weight: by score, or by the token's id."""

    config: ModelConfig
    gate: WideLinear
    bias: Tensor | None
    tid2eid: Tensor | None

    @classmethod
    def of(cls, config: ModelConfig, w: WeightView) -> Router:
        """The router whose weights are `w`."""
        is_hash = "tid2eid" in w
        bias, table = (None, w["tid2eid"]) if is_hash else (w["bias"], None)
        return cls(config, WideLinear(w["weight"]), bias, table)

    def __call__(self, x: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """x [T, D] -> ids [T, K] int32, weights [T, K] FP32; -1 and 0 in padding rows"""
        logits, scaling = self.gate(x), self.config.routed_scaling_factor
        if self.tid2eid is not None:
            return router_hash(logits, self.tid2eid, batch.ids, scaling)
        assert self.bias is not None
        k = self.config.num_experts_per_tok
        return router_topk(logits, self.bias, k, scaling, batch.is_padding)


@dataclass(frozen=True)
class SharedExpert:
    """The expert that sees every token; gate and up are one matrix."""

    gate_up: Fp8Linear
    down: Fp8Linear
    limit: float
    is_fused: bool = True

    @classmethod
    def of(cls, config: ModelConfig, w: WeightView, unfused: Collection[str] = ()) -> SharedExpert:
        """The shared expert whose weights are `w`."""
        gate_up = Fp8Linear.of(join_rows([w.fp8("w1"), w.fp8("w3")]))
        is_fused = "gate_up_swiglu" not in unfused
        return cls(gate_up, Fp8Linear.of(w.fp8("w2")), config.swiglu_limit, is_fused)

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, D] -> [T, D]"""
        gate_up, limit = self.gate_up(x), self.limit
        if self.is_fused:
            return self.down(gate_up_swiglu(gate_up, limit))
        gate, up = gate_up.float().chunk(2, dim=1)
        hidden = silu(gate.clamp(max=limit)) * up.clamp(-limit, limit)
        return self.down(hidden.to(x.dtype))


@dataclass(frozen=True)
class Moe:
    """y = sum of the chosen experts + the shared one."""

    config: ModelConfig
    name: str
    router: Router
    shared: SharedExpert
    experts: ExpertStack
    unfused: frozenset[str] = frozenset()

    @classmethod
    def of(
        cls, config: ModelConfig, w: WeightView, name: str, unfused: Collection[str] = ()
    ) -> Moe:
        """The experts whose weights are `w`; `name` ("layers.3.ffn") is the prefix of taps."""
        shared = SharedExpert.of(config, w.at("shared_experts"), unfused)
        router, experts = Router.of(config, w.at("gate")), w.expert_stack()
        return cls(config, name, router, shared, experts, frozenset(unfused))

    def __call__(self, x: Tensor, batch: Batch) -> Tensor:
        """x [T, D] after the block's norm -> [T, D]"""
        joined = len(x) == 1 and not batch.is_prefill and not JOINED & self.unfused
        out = self._joined(x, batch) if joined else self._chain(x, batch)
        tap(f"{self.name}.out", out)
        return out

    def _choose(self, x: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        ids, weights = self.router(x, batch)
        tap(f"{self.name}.router.ids", ids)
        tap(f"{self.name}.router.weights", weights)
        return ids, weights

    def _joined(self, x: Tensor, batch: Batch) -> Tensor:
        """All experts in one launch, with the bits of `_chain`. It starts while the router runs."""
        e, shared, after_router = self.experts, self.shared, True  # no launch between
        return moe_with_shared(
            x, *self._choose(x, batch), *e.matrices, e.global_scale, shared.gate_up.weight,
            shared.gate_up.scale, shared.down.weight, shared.down.scale,
            self.config.swiglu_limit, 0, e.format, after_router,
        )  # fmt: skip

    def _chain(self, x: Tensor, batch: Batch) -> Tensor:
        """The launches that `_joined` stands for.

        The shared expert goes first: its weights come while the norm before it runs. The routed
        experts start only when all kernels before them are done (kernels.moe.moe_routed_sm90).
        """
        e, shared = self.experts, self.shared(x)
        ids, weights = self._choose(x, batch)
        is_fused = "moe_routed_shared" not in self.unfused
        # Kernels for few rows and for many differ in the last bits, so prompts always take the one
        # for many: rows that no expert sees make up the number.
        missing = max(FEW_ROWS + 1 - len(x), 0) if batch.is_prefill else 0
        if missing:
            x, weights, shared = (pad(t, (0, 0, 0, missing)) for t in (x, weights, shared))
            ids = pad(ids, (0, 0, 0, missing), value=-1)
        out = moe_routed(
            x, ids, weights, *e.matrices, e.global_scale, shared if is_fused else None,
            self.config.swiglu_limit, 0, e.format,
        )  # fmt: skip
        if not is_fused:
            out = out + shared  # in FP32, rounded once; the routed sum was rounded before
        return out[: len(x) - missing]
