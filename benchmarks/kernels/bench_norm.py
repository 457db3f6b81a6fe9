"""Norm kernels. `python -m benchmarks.kernels.bench_norm [--json PATH] [--only OP]`

The baseline is torch.compile of the oracle at the sizes of Flash; the oracle of an op that writes
into the window ring looks for its rows on the host, and is written here without that.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dsv4.core.kv_layout import KvRecord
from dsv4.ops import norm as ops
from dsv4.reference import fused
from dsv4.reference.kv_records import kv_record_pack, kv_record_unpack
from dsv4.reference.norm import rms_norm, rms_norm_unweighted
from dsv4.reference.rope import apply_rope
from dsv4.testing.bench import Case, CompiledOracle, Later, Turns, copies, later, run
from dsv4.testing.cases.cache import EPS
from dsv4.testing.cases.norm import angles, kv_args, norm_weight

TOKENS = (8192, 1024, 64, 8, 1)
FEW_TOKENS = (8192, 1)  # at the sizes of Pro
FLASH = (4096, 1024)
C, R, W = 512, 64, 128
SLOTS, POSITIONS = 64, 512
RECORD = KvRecord().nbytes


def random(*shape: int) -> Tensor:
    """BF16 on the device."""
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


@later
def case(
    op: str, shape: dict[str, Any], make: Callable[[], dict[str, Any]], num_bytes: int,
    oracle: CompiledOracle | None = None,
) -> Case:  # fmt: skip
    """A case that goes round the arguments `make` gives, next to the compiled oracle."""
    args = [make() for _ in range(copies(num_bytes))]
    calls = [partial(getattr(ops, op), **a) for a in args]
    if oracle is None:
        return Case(op, shape, calls, num_bytes)
    base = oracle.calls(args, shape["T"])
    return Case(op, shape, calls, num_bytes, baseline=oracle.NAME, baseline_calls=base)


def row_cases() -> Iterator[Later]:
    for D in (4096, 7168, 1024, 1536):  # hidden sizes and query latents of Flash and Pro
        weight = norm_weight(D, device="cuda")
        plain = CompiledOracle(rms_norm) if D in FLASH else None
        quantising = CompiledOracle(fused.rms_norm_quant) if D in FLASH else None
        for T in TOKENS if D in FLASH else FEW_TOKENS:
            rest = {"weight": weight, "eps": EPS}
            shape = {"T": T, "D": D}
            yield case(
                "rms_norm", shape, lambda T=T, D=D, rest=rest: {"x": random(T, D)} | rest,
                4 * T * D, plain,
            )  # fmt: skip
            for form, written in (("fp8", 1 + 1 / 128), ("mxfp4", 0.5 + 1 / 32)):
                if form != "fp8" and D != 4096:
                    continue
                args = rest | {"form": form}
                yield case(
                    "rms_norm_quant", shape | {"form": form},
                    lambda T=T, D=D, args=args: {"x": random(T, D)} | args,
                    int(T * D * (2 + written)), quantising,
                )  # fmt: skip


def head_cases() -> Iterator[Later]:
    names = "q_norm_rope", "inverse_rope", "inverse_rope_quant"
    oracles = {name: CompiledOracle(getattr(fused, name)) for name in names}
    for H in (64, 128):
        for T in TOKENS if H == 64 else FEW_TOKENS:
            turn = angles(T, device="cuda") | {"position": torch.arange(T, device="cuda")}
            shape, num = {"T": T, "H": H, "C": C}, T * H * C

            def make(name: str, T: int = T, H: int = H, turn: Any = turn, **rest: Any) -> Any:
                return {name: random(T, H, C)} | turn | rest

            for op, name, rest, num_bytes in (
                ("q_norm_rope", "q", {"eps": EPS}, 4 * num),
                ("inverse_rope", "o", {}, 4 * T * H * R),
                ("inverse_rope_quant", "o", {"group": 128}, num * 3 + num // 128),
            ):
                oracle = oracles[op] if H == 64 else None
                yield case(op, shape, partial(make, name, **rest), num_bytes, oracle)


def insert_all(
    kv: Tensor, norm: Tensor, cos: Tensor, sin: Tensor, window: Tensor, slot: Tensor,
    position: Tensor, end_position: Tensor, rows: int, eps: float,
) -> Tensor:  # fmt: skip
    """kv_norm_rope_quant_insert of a step in which every row is written."""
    x = apply_rope(rms_norm(kv, norm, eps), cos[position], sin[position])
    record, layout = kv_record_pack(x, R), KvRecord(C, R)
    row, start = position % rows, layout.scale_offset(rows)
    data = window[:, :start].unflatten(1, (rows, layout.data_bytes))
    scales = window[:, start : rows * layout.nbytes].unflatten(1, (rows, layout.scale_bytes))
    data[slot, row] = record[:, : layout.data_bytes]
    scales[slot, row] = record[:, layout.data_bytes :]
    return kv_record_unpack(record, x.dtype, R)


def q_insert_all(
    q: Tensor, kv: Tensor, norm: Tensor, cos: Tensor, sin: Tensor, window: Tensor, slot: Tensor,
    position: Tensor, end_position: Tensor, rows: int, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """q_kv_norm_rope_insert of such a step."""
    q = apply_rope(rms_norm_unweighted(q, eps), cos[position], sin[position])
    return q, insert_all(kv, norm, cos, sin, window, slot, position, end_position, rows, eps)


def kv_cases() -> Iterator[Later]:
    """Decode has a request a token; prefill requests of 128 tokens, which fill their rings."""
    plain, with_queries = CompiledOracle(insert_all), CompiledOracle(q_insert_all)
    for T in TOKENS:
        spans = [(s, 500, 1) for s in range(T)] if T <= 64 else [(s, 0, W) for s in range(T // W)]
        num_bytes = T * (4 * C + RECORD)

        def make(H: int = 0, spans: Any = spans, T: int = T) -> dict[str, Any]:
            made = kv_args(spans, num_slots=SLOTS, rows=W, device="cuda")
            made |= angles(POSITIONS, device="cuda")  # one length, so that it is compiled once
            return made | ({"q": random(T, H, C)} if H else {})

        yield case("kv_norm_rope_quant_insert", {"T": T, "C": C}, make, num_bytes, plain)
        for H in (64, 128) if T in FEW_TOKENS else (64,):
            shape = {"T": T, "H": H, "C": C}
            both = num_bytes + 4 * T * H * C
            oracle = with_queries if H == 64 else None
            yield case("q_kv_norm_rope_insert", shape, partial(make, H), both, oracle)


def cases() -> Turns:
    """Every row of this file."""
    yield row_cases()
    yield head_cases()
    yield kv_cases()


if __name__ == "__main__":
    run(cases(), "Norm kernels at the shapes of V4-Flash and V4-Pro")
