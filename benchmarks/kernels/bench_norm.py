"""Norm kernels. `python -m benchmarks.kernels.bench_norm [--json PATH] [--only OP]`

The baseline is torch.compile of the oracle at the sizes of Flash; of an op that writes into the
window ring, whose oracle looks for its rows on the host, a device copy that moves as many bytes.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dsv4.core.kv_layout import KvRecord
from dsv4.ops import norm as ops
from dsv4.reference import fused
from dsv4.reference.norm import rms_norm
from dsv4.testing.bench import COLD_BYTES, Case, copy_calls, run
from dsv4.testing.cases.cache import EPS
from dsv4.testing.cases.norm import angles, kv_args, norm_weight

TOKENS = (1, 8, 64, 1024, 8192)
FLASH = (4096, 1024)
C, R, W = 512, 64, 128
RECORD = KvRecord().nbytes
MAX_COPIES = 48


def copies(num_bytes: int) -> int:
    """Sets of buffers to go round: enough to exceed L2, within reason."""
    return max(1, min(MAX_COPIES, -(-COLD_BYTES // num_bytes)))


def random(*shape: int) -> Tensor:
    """BF16 on the device."""
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


def case(
    op: str, shape: dict[str, Any], make: Callable[[], dict[str, Any]], num_bytes: int,
    oracle: Callable | None = None,
) -> Case:  # fmt: skip
    """A case that goes round the arguments `make` gives, next to the compiled oracle or a copy."""
    args = [make() for _ in range(copies(num_bytes))]
    calls = [partial(getattr(ops, op), **a) for a in args]
    if op.endswith("insert"):
        base = copy_calls(num_bytes, copies(num_bytes))
        return Case(op, shape, calls, num_bytes, baseline="copy", baseline_calls=base)
    if oracle is None:
        return Case(op, shape, calls, num_bytes)
    compiled = torch.compile(oracle)  # anew for the second number of tokens, then for any
    base = [partial(compiled, **a) for a in args]
    return Case(op, shape, calls, num_bytes, baseline="torch.compile", baseline_calls=base)


def row_cases() -> Iterator[Case]:
    for D in (4096, 7168, 1024, 1536):  # hidden sizes and query latents of Flash and Pro
        weight = norm_weight(D, device="cuda")
        torch._dynamo.reset()
        for T in TOKENS:
            rest = {"weight": weight, "eps": EPS}
            shape = {"T": T, "D": D}
            yield case(
                "rms_norm", shape, lambda T=T, D=D, rest=rest: {"x": random(T, D)} | rest,
                4 * T * D, rms_norm if D in FLASH else None,
            )  # fmt: skip
            for form, written in (("fp8", 1 + 1 / 128), ("mxfp4", 0.5 + 1 / 32)):
                if form != "fp8" and D != 4096:
                    continue
                args = rest | {"form": form}
                yield case(
                    "rms_norm_quant", shape | {"form": form},
                    lambda T=T, D=D, args=args: {"x": random(T, D)} | args,
                    int(T * D * (2 + written)), fused.rms_norm_quant if D in FLASH else None,
                )  # fmt: skip


def head_cases() -> Iterator[Case]:
    for H in (64, 128):
        for T in TOKENS:
            turn = angles(T, device="cuda") | {"position": torch.arange(T, device="cuda")}
            shape, num = {"T": T, "H": H, "C": C}, T * H * C

            def make(name: str, T: int = T, H: int = H, turn: Any = turn, **rest: Any) -> Any:
                return {name: random(T, H, C)} | turn | rest

            for op, name, rest, num_bytes in (
                ("q_norm_rope", "q", {"eps": EPS}, 4 * num),
                ("inverse_rope", "o", {}, 4 * T * H * R),
                ("inverse_rope_quant", "o", {"group": 128}, num * 3 + num // 128),
            ):
                oracle = getattr(fused, op) if H == 64 else None
                yield case(op, shape, partial(make, name, **rest), num_bytes, oracle)


def kv_cases() -> Iterator[Case]:
    """Decode has a request a token; prefill requests of 128 tokens, which fill their rings."""
    for T in TOKENS:
        spans = [(s, 500, 1) for s in range(T)] if T <= 64 else [(s, 0, W) for s in range(T // W)]
        num_bytes = T * (4 * C + RECORD)

        def make(H: int = 0, spans: Any = spans, T: int = T) -> dict[str, Any]:
            made = kv_args(spans, num_slots=len(spans), rows=W, device="cuda")
            return made | ({"q": random(T, H, C)} if H else {})

        yield case("kv_norm_rope_quant_insert", {"T": T, "C": C}, make, num_bytes)
        for H in (64, 128):
            shape = {"T": T, "H": H, "C": C}
            both = num_bytes + 4 * T * H * C
            yield case("q_kv_norm_rope_insert", shape, partial(make, H), both)


def cases() -> Iterator[Case]:
    """Every row of this file."""
    yield from row_cases()
    yield from head_cases()
    yield from kv_cases()


if __name__ == "__main__":
    run(cases(), "Norm kernels at the shapes of V4-Flash and V4-Pro")
