"""latent_kv_norm_pack: bit for bit where FP32 sums are exact, against FP64 elsewhere."""

from typing import Any

import pytest
import torch

from dsv4.kernels.attention import latent_kv_norm_pack as kernel
from dsv4.ops import attention as ops
from dsv4.reference import paged_attention as oracle
from dsv4.testing.cases import DEVICE
from dsv4.testing.cases.attention import latent_kv_args
from dsv4.testing.numeric import assert_as_exact_as, assert_bits_equal

pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []

BF16, FP32 = torch.bfloat16, torch.float32
SIZES = [(5, 1024, 512, 64), (2, 1536, 512, 64), (3, 128, 512, 64), (4, 96, 128, 64),
         (1, 40, 192, 64), (0, 128, 512, 64)]  # fmt: skip
if DEVICE == "cuda":
    SIZES += [(8192, 1024, 512, 64)]


def on_cpu(args: dict[str, Any]) -> dict[str, Any]:
    return {k: v.cpu() if isinstance(v, torch.Tensor) else v for k, v in args.items()}


@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_equals_the_oracle(sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    args = latent_kv_args(*sizes, dtype=dtype, is_exact=True, device=DEVICE)
    out = kernel.outputs(**args)
    for x in out:
        x.fill_(float("nan") if x.is_floating_point() else 0xFF)
    kernel.launch(**args, out=out)
    want = oracle.latent_kv_norm_pack(**on_cpu(args))
    for name, got, expected in zip(("latent", "kv", "page"), out, want, strict=True):
        assert_bits_equal(name, got, expected)


def test_random_rows_are_as_exact_as_the_oracle() -> None:
    args = latent_kv_args(6, 1024, device=DEVICE)
    latent, kv, page = ops.latent_kv_norm_pack(**args)
    same = oracle.latent_kv_norm_pack(**on_cpu(args))
    wide = on_cpu(args) | {"x": args["x"].cpu().double()}
    wide |= {name: args[name].cpu().double() for name in ("q_norm", "kv_norm")}
    exact = oracle.latent_kv_norm_pack(**wide)
    for row in range(6):  # rows differ in magnitude, and each has to be exact
        assert_as_exact_as("latent", latent[row].cpu(), same[0][row], exact[0][row])
        assert_as_exact_as("kv", kv[row].cpu(), same[1][row], exact[1][row])
    assert_bits_equal("page", page, ops.kv_step_pack(kv, 64))


def test_a_row_is_on_its_own() -> None:
    args = latent_kv_args(9, 128, device=DEVICE)
    latent, kv, page = ops.latent_kv_norm_pack(**args)
    for t in (0, 4, 8):
        one = args | {k: args[k][t : t + 1].clone() for k in ("x", "position")}
        got = ops.latent_kv_norm_pack(**one)
        assert_bits_equal("latent", got[0], latent[t : t + 1])
        assert_bits_equal("kv", got[1], kv[t : t + 1])
        assert_bits_equal("record", got[2][:576], page[576 * t : 576 * (t + 1)])


def test_op_contract() -> None:
    args = latent_kv_args(3, 64, 128, device=DEVICE)
    torch.library.opcheck(ops.latent_kv_norm_pack.op, tuple(args.values()))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("x", torch.zeros(2, 600, dtype=BF16), "x: expected shape"),
        ("x", torch.zeros(2, 640, dtype=torch.float16), "x: expected torch.float32 or"),
        ("q_norm", torch.zeros(128, dtype=torch.float16), "q_norm: expected torch.float32 or"),
        ("position", torch.zeros(2, dtype=torch.int32), "position: expected torch.int64"),
        ("cos", torch.zeros(300, 32, dtype=BF16), "cos: expected torch.float32"),
    ],
)
def test_names_the_bad_argument(name: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ops.latent_kv_norm_pack(
            **(latent_kv_args(2, 128, device=DEVICE) | {name: value.to(DEVICE)})
        )
