"""FP8 with a UE8M0 scale a group: activations, the input of FP8 linears. Triton, SM 8.9 on."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4.core.checks import check_tensors
from dsv4.core.dispatch import KernelSpec
from dsv4.kernels.common.bits import widen
from dsv4.kernels.common.checks import check_float, check_power_of_two
from dsv4.kernels.common.launch import EXACT, INTERPRETED
from dsv4.kernels.common.rows import fp8_rows

REFERENCE = "dsv4.reference.quant:fp8_act_quantize"
CONFIG = {"TILE": 2048, "num_warps": 4}  # elements a program; swept on H200, T = 8192
SMALL_CONFIG = {"TILE": 1024, "num_warps": 4}  # T = 1
FEW = 1 << 20  # elements that larger tiles would not spread over the whole card


@triton.jit
def fp8_act_quantize_kernel(
    x_ptr, data_ptr, scale_ptr, num_groups, GROUP: tl.constexpr, BLOCK_G: tl.constexpr
):
    first = tl.program_id(0).to(tl.int64) * BLOCK_G
    g = tl.arange(0, BLOCK_G)
    live = g < num_groups - first
    at = first * GROUP + g[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    value, scale = fp8_rows(widen(tl.load(x_ptr + at, live[:, None], 0.0)))
    tl.store(data_ptr + at, value, live[:, None])
    tl.store(scale_ptr + first + g, scale, live)


def outputs(x: Tensor, group: int = 128) -> tuple[Tensor, Tensor]:
    """Allocate the values and the scales. Doubles as the op's fake."""
    groups = check_groups("x", x, group)
    scale = x.new_empty((*x.shape[:-1], groups), dtype=torch.float8_e8m0fnu)
    return x.new_empty(x.shape, dtype=torch.float8_e4m3fn), scale


def check_groups(name: str, x: Tensor, group: int) -> int:
    """Groups in a row of `x`, whose size is a power of two."""
    check_power_of_two("group", group)
    if x.dim() == 0 or x.shape[-1] % group:
        raise ValueError(
            f"{name}: expected a last dim divisible by {group}, got shape {list(x.shape)}"
        )
    return x.shape[-1] // group


def config_for(config: dict[str, int], numel: int) -> tuple[int, int]:
    """Elements and warps of a program; no bit of the result depends on them."""
    chosen = SMALL_CONFIG if numel < FEW else config
    return chosen["TILE"], chosen["num_warps"]


def launch(x: Tensor, group: int, out: tuple[Tensor, Tensor]) -> None:
    """Fill `out`. Allocates nothing and reads nothing back, so a CUDA graph can hold it."""
    value, scale = out
    groups = check_groups("x", x, group)
    *rows, K = x.shape
    lead = " ".join(map(str, rows))
    check_tensors(
        x=(x, f"{lead} {K}", check_float("x", x)),
        value=(value, f"{lead} {K}", torch.float8_e4m3fn),
        scale=(scale, f"{lead} {groups}", torch.float8_e8m0fnu),
    )
    if x.numel() == 0:
        return
    tile, num_warps = config_for(CONFIG, x.numel())
    num_groups, block = x.numel() // group, max(tile // group, 1)
    fp8_act_quantize_kernel[(triton.cdiv(num_groups, block),)](
        x, value.view(torch.uint8), scale.view(torch.uint8), num_groups, GROUP=group,
        BLOCK_G=block, num_warps=num_warps, **EXACT,
    )  # fmt: skip


SPEC = KernelSpec("fp8_act_quantize/triton", launch, runs_on_cpu=INTERPRETED)
