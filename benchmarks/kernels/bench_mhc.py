"""mHC kernels. `python -m benchmarks.kernels.bench_mhc [--json PATH] [--only OP]`

The baseline is torch.compile of the oracle.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dsv4.ops import mhc as ops
from dsv4.reference import mhc as reference
from dsv4.testing.bench import COLD_BYTES, Case, nbytes, run
from dsv4.testing.cases.mhc import mhc_case

FLASH, PRO = 4096, 7168
SHAPES = [(8192, FLASH), (1024, FLASH), (64, FLASH), (8, FLASH), (1, FLASH)]
PRO_SHAPES = [(8192, PRO), (8, PRO), (1, PRO)]
FP8_TOKENS = (8192, 8, 1)
MAX_COPIES = 96


def copies(num_bytes: int) -> int:
    """Sets of buffers to go round: enough to exceed L2, within reason."""
    return max(1, min(MAX_COPIES, -(-COLD_BYTES // num_bytes)))


def tensors(x: Any) -> list[Tensor]:
    """The tensors among arguments or results."""
    return [t for t in (x if isinstance(x, tuple | list) else (x,)) if isinstance(t, Tensor)]


def large_case(op: str, T: int, D: int, **options: Any) -> dict[str, Any]:
    """The tokens of a small case over and over."""
    args = mhc_case(op, min(T, 64), D, device="cuda", **options)
    per_token = ("o", "x", "post", "comb")
    times = max(T // 64, 1)
    return {k: torch.cat([v] * times) if k in per_token else v for k, v in args.items()}


def case(op: str, T: int, D: int, baseline: Callable | None, **options: Any) -> Case:
    """One op at one size."""
    args, fn = large_case(op, T, D, **options), getattr(ops, op)
    num_bytes = nbytes(*tensors(list(args.values())), *tensors(fn(**args)))
    sets = [
        {k: v.clone() if isinstance(v, Tensor) else v for k, v in args.items()}
        for _ in range(copies(num_bytes))
    ]
    shape: dict[str, int | str] = {"T": T, "D": D}
    if args.get("quantise"):
        shape["form"] = "fp8"
    return Case(
        op, shape, [partial(fn, **a) for a in sets], num_bytes,
        baseline=None if baseline is None else "torch.compile",
        baseline_calls=[] if baseline is None else [partial(baseline, **a) for a in sets],
    )  # fmt: skip


def cases() -> Iterator[Case]:
    """Every row of this file."""
    for op in ("mhc_post_pre", "mhc_pre_norm", "mhc_post", "hc_head_norm"):
        # Descending, so that it is compiled once for a size, once for any, and once for one token.
        baseline = torch.compile(getattr(reference, op))
        for T, D in SHAPES:
            yield case(op, T, D, baseline)
        for T, D in PRO_SHAPES:
            yield case(op, T, D, None)
        if op in ("mhc_post_pre", "mhc_pre_norm"):
            for T in FP8_TOKENS:
                yield case(op, T, FLASH, None, quantise=True)


if __name__ == "__main__":
    run(cases(), "mHC kernels at the widths of V4-Flash and V4-Pro")
