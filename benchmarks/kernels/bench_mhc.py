"""mHC kernels. `python -m benchmarks.kernels.bench_mhc [--json PATH] [--only OP]`

The baseline is torch.compile of the oracle.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dsv4.ops import mhc as ops
from dsv4.reference import mhc as reference
from dsv4.testing.bench import Case, CompiledOracle, Later, copies, later, nbytes, run
from dsv4.testing.cases.mhc import mhc_case

FLASH, PRO = 4096, 7168
# The most tokens first, as the baseline is compiled for them.
SHAPES = [(8192, FLASH), (1024, FLASH), (64, FLASH), (8, FLASH), (1, FLASH)]
PRO_SHAPES = [(8192, PRO), (8, PRO), (1, PRO)]
FP8_TOKENS = (8192, 8, 1)


def tensors(x: Any) -> list[Tensor]:
    """The tensors among arguments or results."""
    return [t for t in (x if isinstance(x, tuple | list) else (x,)) if isinstance(t, Tensor)]


def large_case(op: str, T: int, D: int, **options: Any) -> dict[str, Any]:
    """The tokens of a small case over and over."""
    args = mhc_case(op, min(T, 64), D, device="cuda", **options)
    per_token = ("o", "x", "post", "comb")
    times = max(T // 64, 1)
    return {k: torch.cat([v] * times) if k in per_token else v for k, v in args.items()}


@later
def case(op: str, T: int, D: int, baseline: CompiledOracle | None, **options: Any) -> Case:
    """One op at one size."""
    args, fn = large_case(op, T, D, **options), getattr(ops, op)
    num_bytes = nbytes(*tensors(list(args.values())), *tensors(fn(**args)))
    sets = [
        {k: v.clone() if isinstance(v, Tensor) else v for k, v in args.items()}
        for _ in range(copies(num_bytes, 96))
    ]
    shape: dict[str, int | str] = {"T": T, "D": D}
    if args.get("quantise"):
        shape["form"] = "fp8"
    calls = [partial(fn, **a) for a in sets]
    if baseline is None:
        return Case(op, shape, calls, num_bytes)
    base = baseline.calls(sets, T)
    return Case(op, shape, calls, num_bytes, baseline=baseline.NAME, baseline_calls=base)


def cases() -> Iterator[Later]:
    """Every row of this file."""
    for op in ("mhc_post_pre", "mhc_pre_norm", "mhc_post", "hc_head_norm"):
        baseline = CompiledOracle(getattr(reference, op))
        for T, D in SHAPES:
            yield case(op, T, D, baseline)
        for T, D in PRO_SHAPES:
            yield case(op, T, D, None)
        if op in ("mhc_post_pre", "mhc_pre_norm"):
            for T in FP8_TOKENS:
                yield case(op, T, FLASH, None, quantise=True)


if __name__ == "__main__":
    run(cases(), "mHC kernels at the widths of V4-Flash and V4-Pro")
