"""Quantising kernels. `python -m benchmarks.kernels.bench_quant [--json PATH] [--only OP]`

The baseline is torch.compile of the oracle.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch

from dsv4.ops import quant as ops
from dsv4.reference import fused, quant
from dsv4.testing.bench import Case, CompiledOracle, Later, Turns, copies, later, nbytes, run

TOKENS = (8192, 1024, 64, 8, 1)
BF16 = torch.bfloat16


@later
def case(
    op: str, shape: dict[str, Any], make: Callable[[], dict[str, Any]], num_bytes: int,
    oracle: CompiledOracle | None,
) -> Case:  # fmt: skip
    """A case that goes round the arguments `make` gives, next to the compiled oracle."""
    args = [make() for _ in range(copies(num_bytes))]
    calls = [partial(getattr(ops, op), **a) for a in args]
    if oracle is None:
        return Case(op, shape, calls, num_bytes)
    base = oracle.calls(args, shape.get("T"))
    return Case(op, shape, calls, num_bytes, baseline=oracle.NAME, baseline_calls=base)


def activation_cases(T: int, D: int, baselines: Mapping[str, CompiledOracle]) -> Turns:
    """Every format of activations."""
    share = torch.tensor(0.002, device="cuda")
    kinds: list[tuple[str, dict[str, Any], tuple[str, ...]]] = [
        ("fp8_act", {}, ("data", "scale")),
        ("mxfp4_act", {}, ("packed", "scale")),
        ("nvfp4_act", {"global_scale": share}, ("packed", "scale", "global_scale")),
    ]
    for kind, given, names in kinds:
        yield there_and_back(T, D, kind, given, names, baselines)


def there_and_back(
    T: int, D: int, kind: str, given: dict[str, Any], names: tuple[str, ...],
    baselines: Mapping[str, CompiledOracle],
) -> Iterator[Later]:  # fmt: skip
    """From BF16, and back to it."""

    def make(given: dict[str, Any] = given) -> dict[str, Any]:
        return {"x": torch.randn(T, D, device="cuda", dtype=BF16), **given}

    def back() -> dict[str, Any]:
        made = getattr(ops, f"{kind}_quantize")(**make())
        return dict(zip(names, made, strict=True)) | {"dtype": BF16}

    there, again, shape = f"{kind}_quantize", f"{kind}_dequantize", {"T": T, "D": D}
    num_bytes = 2 * T * D + nbytes(*(x for k, x in back().items() if k != "dtype"))
    yield case(there, shape, make, num_bytes, baselines.get(there))
    if given:  # the maximum of the tensor itself, which has to be read twice
        yield case(there, shape | {"amax": "own"}, partial(make, {}), num_bytes + 2 * T * D,
                   baselines.get(f"{there}, own"))  # fmt: skip
    yield case(again, shape, back, num_bytes, baselines.get(again))


def baselines() -> dict[str, CompiledOracle]:
    """Of the activation ops, by name."""
    made = {
        name: CompiledOracle(getattr(fused if "nvfp4" in name else quant, name))
        for kind in ("fp8", "mxfp4", "nvfp4")
        for name in (f"{kind}_act_quantize", f"{kind}_act_dequantize")
    }
    return made | {"nvfp4_act_quantize, own": CompiledOracle(fused.nvfp4_act_quantize)}


def weight_cases(N: int, K: int) -> Iterator[Later]:
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

    back_again = CompiledOracle(fused.fp8_block_dequantize)
    yield case("fp8_block_quantize", shape, make, num_bytes, CompiledOracle(oracle))
    yield case("fp8_block_dequantize", shape, back, num_bytes, back_again)


def cases() -> Turns:
    """Every row of this file."""
    compiled = baselines()
    for T in TOKENS:
        yield activation_cases(T, 4096, compiled)
    yield activation_cases(8192, 7168, {})
    for N, K in ((4096, 4096), (32768, 1024), (65536, 1536)):  # a shared expert, wq_b of both
        yield weight_cases(N, K)


if __name__ == "__main__":
    run(cases(), "Quantising kernels at the shapes of V4-Flash and V4-Pro")
