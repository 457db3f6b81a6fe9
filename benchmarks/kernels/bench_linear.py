"""Linear kernels. `python -m benchmarks.kernels.bench_linear [--json PATH] [--only OP]`

Bytes are those of the weight, its scales, x and y. The baseline is cuBLAS with the weight in BF16,
which reads twice the bytes; of the grouped projection it is one batched product.
"""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from dsv4.ops import linear as ops
from dsv4.testing.bench import COLD_BYTES, Case, Turns, nbytes, run
from dsv4.testing.cases.linear import FLASH, HEAD_FLASH, JOINED_FLASH, PRO, WIDE_FLASH

DECODE, PREFILL = (1, 8, 64), (1024, 8192)
FP8 = (*DECODE, 128, 512, *PREFILL)
GATE_PRO = (384, 7168)
RATIO = {"csa": 4, "hca": 128}  # places of a window


def random_weight(N: int, K: int) -> tuple[Tensor, Tensor]:
    """On the device from the start."""
    weight = (32 * torch.randn(N, K, device="cuda")).clamp(-448, 448).to(torch.float8_e4m3fn)
    scale = torch.randint(114, 118, (-(-N // 128), -(-K // 128)), device="cuda")
    return weight, scale.to(torch.uint8).view(torch.float8_e8m0fnu)


def tokens(M: int, width: int) -> Tensor:
    """Normal numbers, every row of another magnitude."""
    x = torch.randn(M, width, device="cuda")
    return (x * torch.exp2(torch.arange(M, device="cuda") % 7 - 3.0)[:, None]).to(torch.bfloat16)


def cublas(x: Tensor, w_GOK: Tensor) -> Tensor:
    """The product in BF16."""
    if len(w_GOK) == 1:
        return torch.mm(x, w_GOK[0].T)
    return torch.bmm(x.unflatten(-1, (len(w_GOK), -1)).transpose(0, 1), w_GOK.transpose(1, 2))


def fp8_cases(
    name: str, shape: tuple[int, int, int], counts: tuple[int, ...], modes: tuple[str, ...]
) -> Iterator[Case]:
    N, K, groups = shape
    copies = -(-COLD_BYTES // (N * K)) + 1
    weights = [random_weight(N, K) for _ in range(copies)]
    bf16 = [w.to(torch.bfloat16).unflatten(0, (groups, -1)) for w, _ in weights]
    for M in counts:
        x = tokens(M, groups * K)
        num_bytes = nbytes(*weights[0], x) + 2 * M * N
        for mode in modes:
            yield Case(
                "linear_fp8",
                {"name": name, "M": M, "mode": mode},
                [partial(ops.linear_fp8, x, w, s, groups, mode == "w8a8") for w, s in weights],
                num_bytes,
                flops=2 * M * N * K,
                is_compute=M > 256,
                baseline="cuBLAS BF16",
                baseline_calls=[partial(cublas, x, w) for w in bf16],
            )


def wide_cases(
    op: str, name: str, shape: tuple[int, int], counts: tuple[int, ...]
) -> Iterator[Case]:
    """BF16 weights with FP32 results."""
    N, K = shape
    copies = -(-COLD_BYTES // (2 * N * K)) + 1
    weights = [torch.randn(N, K, device="cuda").to(torch.bfloat16) for _ in range(copies)]
    baseline = partial(torch.mm, out_dtype=torch.float32)
    for M in counts:
        x = tokens(M, K)
        yield Case(
            op,
            {"name": name, "M": M} if name else {"M": M},
            [partial(ops.wide_linear, x, w) for w in weights],
            nbytes(weights[0], x) + 4 * M * N,
            flops=2 * M * N * K,
            is_compute=M > 256,
            baseline="cuBLAS BF16",
            baseline_calls=[partial(baseline, x, w.T) for w in weights],
        )


def joined_cases(name: str, parts: list[int], K: int) -> Iterator[Case]:
    """What a compressed layer projects its hidden state to; the baseline adds no bias."""
    N, ratio = sum(parts), RATIO[name]
    copies = -(-COLD_BYTES // (2 * N * K)) + 1
    weights = [torch.randn(N, K, device="cuda").to(torch.bfloat16) for _ in range(copies)]
    bias = torch.randn(ratio, N, device="cuda")
    baseline = partial(torch.mm, out_dtype=torch.float32)
    for M in DECODE + PREFILL:
        x, position = tokens(M, K), torch.arange(M, device="cuda")
        yield Case(
            "joined_wide_linear",
            {"name": name, "M": M},
            [partial(ops.joined_wide_linear, x, w, bias, position, parts) for w in weights],
            nbytes(weights[0], x, position) + 4 * min(M, ratio) * N + 4 * M * N,
            flops=2 * M * N * K,
            is_compute=M > 256,
            baseline="cuBLAS BF16",
            baseline_calls=[partial(baseline, x, w.T) for w in weights],
        )


def cases() -> Turns:
    """Every row of this file."""
    modes = ("w8a16", "w8a8")
    for name, shape in FLASH.items():
        yield fp8_cases(name, shape, FP8, modes)
    for name, shape in PRO.items():
        yield fp8_cases(f"pro_{name}", shape, DECODE + PREFILL[-1:], modes)
    for name, parts in JOINED_FLASH.items():
        yield joined_cases(name, parts, WIDE_FLASH["gate"][1])
    for name, shape in WIDE_FLASH.items():
        yield wide_cases("wide_linear", name, shape, DECODE + PREFILL)
    yield wide_cases("wide_linear", "pro_gate", GATE_PRO, DECODE)
    yield wide_cases("lm_head", "", HEAD_FLASH, DECODE)


if __name__ == "__main__":
    run(cases(), "Linear kernels at the shapes of V4-Flash and V4-Pro")
