"""The activation kernel against dsv4.reference.activation."""

from typing import Any

import pytest
import torch

from dsv4.kernels.activation import gate_up_swiglu as kernel
from dsv4.ops import activation as ops
from dsv4.reference import activation as oracle
from dsv4.testing.cases import DEVICE
from dsv4.testing.cases.activation import activation_case
from dsv4.testing.numeric import assert_as_exact_as, assert_bits_equal

pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []

SHAPES = [(3, 128), (1, 2048), (2, 3072), (5, 37), (0, 128), (4, 0)]
if DEVICE == "cuda":
    SHAPES += [(8192, 2048), (64, 3072)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("T", "F"), SHAPES)
def test_as_exact_as_the_oracle(T: int, F: int, dtype: torch.dtype) -> None:
    args = activation_case(T, F, dtype, DEVICE)
    out = kernel.outputs(**args).fill_(float("nan"))
    kernel.launch(**args, out=out)
    same = oracle.gate_up_swiglu(**args)
    assert out.shape == same.shape == (T, F)
    if out.numel():
        wide = oracle.gate_up_swiglu(args["gate_up"].double(), args["limit"])
        assert_as_exact_as("activation", out, same, wide)


def test_a_row_is_on_its_own() -> None:
    args = activation_case(6, 300, device=DEVICE)
    whole = ops.gate_up_swiglu(**args)
    for t in range(6):
        one = ops.gate_up_swiglu(args["gate_up"][t : t + 1].clone(), args["limit"])
        assert_bits_equal("row", whole[t : t + 1], one)


def test_what_is_no_number_stays_none() -> None:
    x = torch.tensor([[float("nan"), 1.0, 1e30, -1e30, 1.0, float("nan"), 1e30, -1e30]])
    out = ops.gate_up_swiglu(x.to(DEVICE), 10.0)[0].cpu()
    assert bool(out[:2].isnan().all())
    assert out[2].item() == pytest.approx(10 * 10, rel=1e-4)
    assert out[3].item() == 0


def test_op_contract() -> None:
    torch.library.opcheck(
        ops.gate_up_swiglu.op, tuple(activation_case(3, 64, device=DEVICE).values())
    )


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("gate_up", torch.zeros(2, 3), "gate_up: expected"),
        ("gate_up", torch.zeros(4), "gate_up: expected"),
        ("gate_up", torch.zeros(2, 4, dtype=torch.float16), "gate_up: expected torch.float32 or"),
        ("limit", 0.0, "limit: expected a number above 0"),
    ],
)
def test_names_the_bad_argument(name: str, value: Any, message: str) -> None:
    value = value.to(DEVICE) if isinstance(value, torch.Tensor) else value
    with pytest.raises(ValueError, match=message):
        ops.gate_up_swiglu(**(activation_case(2, 4, device=DEVICE) | {name: value}))
