"""Quantising kernels. `python -m benchmarks.kernels.bench_quant [--json PATH] [--only OP]`

The baseline is torch.compile of the oracle.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from dsv4.ops import quant as ops
from dsv4.reference import fused, quant
from dsv4.testing.bench import COLD_BYTES, Case, nbytes, run

TOKENS = (1, 8, 64, 1024, 8192)
BF16 = torch.bfloat16
MAX_COPIES = 48


def case(
    op: str, shape: dict[str, Any], make: Callable[[], dict[str, Any]], num_bytes: int,
    oracle: Callable,
) -> Case:  # fmt: skip
    """A case that goes round the arguments `make` gives, next to the compiled oracle."""
    args = [make() for _ in range(max(1, min(MAX_COPIES, -(-COLD_BYTES // num_bytes))))]
    calls = [partial(getattr(ops, op), **a) for a in args]
    compiled = torch.compile(oracle)  # anew for the second number of tokens, then for any
    base = [partial(compiled, **a) for a in args]
    return Case(op, shape, calls, num_bytes, baseline="torch.compile", baseline_calls=base)


def there_and_back(T: int, D: int) -> Iterator[Case]:
    """Activations: from BF16, and back to it."""
    shape = {"T": T, "D": D}
    share = torch.tensor(0.002, device="cuda")
    kinds: list[tuple[str, Any, dict[str, Any], tuple[str, ...]]] = [
        ("fp8_act", quant, {}, ("data", "scale")),
        ("mxfp4_act", quant, {}, ("packed", "scale")),
        ("nvfp4_act", fused, {"global_scale": share}, ("packed", "scale", "global_scale")),
    ]
    for kind, oracle, given, names in kinds:

        def make(given: Any = given) -> dict[str, Any]:
            return {"x": torch.randn(T, D, device="cuda", dtype=BF16), **given}

        def back(make: Any = make, kind: str = kind, names: Any = names) -> dict[str, Any]:
            made = getattr(ops, f"{kind}_quantize")(**make())
            return dict(zip(names, made, strict=True)) | {"dtype": BF16}

        there, again = f"{kind}_quantize", f"{kind}_dequantize"
        num_bytes = 2 * T * D + nbytes(*(x for k, x in back().items() if k != "dtype"))
        yield case(there, shape, make, num_bytes, getattr(oracle, there))
        if given:  # the maximum of the tensor itself, which has to be read twice
            yield case(there, shape | {"amax": "own"}, partial(make, {}), num_bytes + 2 * T * D,
                       getattr(oracle, there))  # fmt: skip
        yield case(again, shape, back, num_bytes, getattr(oracle, again))


def weight_cases(N: int, K: int) -> Iterator[Case]:
    torch._dynamo.reset()
    shape, num_bytes = {"N": N, "K": K}, 3 * N * K + N * K // 128**2

    def make() -> dict[str, Any]:
        return {"w": torch.randn(N, K, device="cuda", dtype=BF16)}

    def back() -> dict[str, Any]:
        return dict(zip(("data", "scale"), ops.fp8_block_quantize(**make()), strict=True)) | {
            "dtype": BF16
        }

    def oracle(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """fp8_block_quantize without its look at the values, which is on the host."""
        tiles = w.float().unflatten(1, (-1, 128)).unflatten(0, (-1, 128))
        scale = quant.e8m0_scale(tiles.abs().amax(dim=(1, 3)), quant.FP8_MAX, quant.FP8_FLOOR)
        spread = quant.e8m0_decode(scale)[:, None, :, None]
        return quant.e4m3_round(tiles / spread).view(w.shape), scale

    yield case("fp8_block_quantize", shape, make, num_bytes, oracle)
    yield case("fp8_block_dequantize", shape, back, num_bytes, fused.fp8_block_dequantize)


def cases() -> Iterator[Case]:
    """Every row of this file."""
    for T in TOKENS:
        yield from there_and_back(T, 4096)
    torch._dynamo.reset()
    yield from there_and_back(8192, 7168)
    for N, K in ((4096, 4096), (32768, 1024), (65536, 1536)):  # a shared expert, wq_b of both
        yield from weight_cases(N, K)


if __name__ == "__main__":
    run(cases(), "Quantising kernels at the shapes of V4-Flash and V4-Pro")
