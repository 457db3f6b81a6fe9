"""joined_wide_linear: the parts, each on its own, against FP64; a row is on its own."""

from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from dsv4.kernels.linear import joined_wide_linear as portable
from dsv4.kernels.linear import joined_wide_linear_sm90 as hopper
from dsv4.ops import linear as ops
from dsv4.reference import linear as oracle
from dsv4.testing.cases import DEVICE
from dsv4.testing.cases.linear import JOINED_FLASH, joined_args
from dsv4.testing.numeric import assert_bits_equal
from support.wide_error import assert_within, wide_error

pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []

CASES = [
    (3, 256, [64, 64, 32, 32, 8], 4), (1, 256, [128, 128], 128), (5, 200, [70], 4),
    (17, 128, [1, 2, 3], 1), (2, 384, [50, 13, 1, 90], 7), (70, 128, [64, 64], 4),
    (0, 128, [64], 4), (7, 1536, [16, 3], 4),
]  # fmt: skip
KERNELS = [(portable, *case) for case in CASES]
if DEVICE == "cuda":
    FULL = [(T, 4096, parts, 4) for T in (1, 8, 64, 2000) for parts in JOINED_FLASH.values()]
    FEW = [
        (1, 512, [64], 1), (3, 1024, [40, 25], 7), (20, 1536, [16, 3], 4), (64, 2048, [9, 90], 4),
        (33, 4096, [100, 60], 128), (40, 7168, [2000, 624], 4),
    ]  # fmt: skip
    KERNELS += [(portable, *case) for case in FULL + FEW]
    if torch.cuda.get_device_capability()[0] == 9:
        KERNELS += [(hopper, *case) for case in FULL + FEW if case[0] <= 64]


@pytest.mark.parametrize(
    ("kernel", "T", "K", "parts", "ratio"), KERNELS, ids=lambda p: getattr(p, "__name__", str(p))
)
def test_equals_the_oracle(
    kernel: ModuleType, T: int, K: int, parts: list[int], ratio: int
) -> None:
    args = joined_args(T, K, parts, ratio, device=DEVICE)
    out = kernel.outputs(**args)
    out[0].fill_(float("nan"))
    out[1].fill_(float("nan"))
    kernel.launch(**args, out=out)
    same = oracle.joined_wide_linear(**args)
    wide = args | {name: args[name].double() for name in ("x", "weight", "bias")}
    exact = oracle.joined_wide_linear(**wide)
    assert out[0].shape == same.shape == (T * sum(parts),)
    y, want = (in_rows(flat, T, parts) for flat in (out[0], exact))
    assert_within("y", y, want, wide_error(args["x"], args["weight"]) + 2.0**-23 * want.abs())


def in_rows(flat: Tensor, T: int, parts: list[int]) -> Tensor:
    """[T, sum(parts)] of parts that follow each other."""
    pieces = flat.split([T * rows for rows in parts])
    return torch.cat([p.view(T, rows) for p, rows in zip(pieces, parts, strict=True)], dim=1)


def test_parts_lie_one_after_the_other() -> None:
    args = joined_args(6, 128, [64, 10, 3], device=DEVICE)
    flat, at = ops.joined_wide_linear(**args), 0
    bias = args["bias"][args["position"] % 4]
    for part, own in zip(
        args["weight"].split([64, 10, 3]), bias.split([64, 10, 3], 1), strict=True
    ):
        got = flat[6 * at : 6 * (at + len(part))].view(6, -1)
        want = oracle.wide_linear(args["x"], part) + own
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-4)
        at += len(part)


@pytest.mark.parametrize("T", [1, 5, 40])
def test_a_row_is_on_its_own(T: int) -> None:
    args = joined_args(T, 640, [64, 20], device=DEVICE)
    whole = ops.joined_wide_linear(**args)
    one = args | {k: args[k][-1:].clone() for k in ("x", "position")}
    got = ops.joined_wide_linear(**one)
    last = torch.cat((whole[: 64 * T].view(T, 64)[-1], whole[64 * T :].view(T, 20)[-1]))
    assert_bits_equal("row", got, last)


def test_op_contract() -> None:
    args = joined_args(3, 128, [64, 8], device=DEVICE)
    torch.library.opcheck(ops.joined_wide_linear.op, tuple(args.values()))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("parts", [64, 7], "parts: expected at most 5 with the sum 72"),
        ("parts", [12] * 6, "parts: expected at most 5"),
        ("parts", [72, 0], r"parts\[1\]: expected an integer >= 1"),
        ("x", torch.zeros(3, 64, dtype=torch.bfloat16), "expected shape"),
        ("bias", torch.zeros(4, 71), "bias: expected shape"),
        ("position", torch.zeros(3, dtype=torch.int32), "position: expected torch.int64"),
    ],
    ids=str,
)
def test_names_the_bad_argument(name: str, value: Any, message: str) -> None:
    value = value.to(DEVICE) if isinstance(value, torch.Tensor) else value
    with pytest.raises(ValueError, match=message):
        ops.joined_wide_linear(**(joined_args(3, 128, [64, 8], device=DEVICE) | {name: value}))
