"""The embedding kernel against dsv4.reference.mhc.embed_streams, bit for bit."""

from typing import Any

import pytest
import torch

from dsv4.kernels.embedding import embed_streams as kernel
from dsv4.ops import embedding as ops
from dsv4.reference import mhc as oracle
from dsv4.testing.cases import DEVICE
from dsv4.testing.cases.embedding import embedding_case
from dsv4.testing.numeric import assert_bits_equal

pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []

SHAPES = [(1, 7, 256), (9, 40, 200), (5, 3, 1500), (0, 4, 256)]
if DEVICE == "cuda":
    SHAPES += [(8192, 500, 4096), (100, 300, 7168)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("T", "V", "D"), SHAPES)
def test_equals_the_oracle(T: int, V: int, D: int, dtype: torch.dtype) -> None:
    args = embedding_case(T, V, D, dtype, DEVICE)
    assert_bits_equal("streams", ops.embed_streams(**args), oracle.embed_streams(**args))


def test_ids_outside_read_nothing() -> None:
    """Known and unknown ids, the table between NaNs, the result NaN before."""
    args = embedding_case(24, 5, 128, device=DEVICE)
    memory = torch.full((15, 128), float("nan"), dtype=torch.bfloat16, device=DEVICE)
    memory[5:10] = args["table"]
    args["table"] = memory[5:10]
    args["ids"][:6] = torch.tensor([-1, 5, -5, 9, 2**31, -(2**63)])
    out = kernel.outputs(**args).fill_(float("nan"))
    kernel.launch(**args, out=out)
    assert_bits_equal("streams", out, oracle.embed_streams(**args))
    assert bool((out[:6] == 0).all())


def test_op_contract() -> None:
    args = embedding_case(4, 6, 128, device=DEVICE)
    torch.library.opcheck(ops.embed_streams.op, tuple(args.values()))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("ids", torch.zeros(2, dtype=torch.int32), "ids: expected torch.int64"),
        ("ids", torch.zeros(2, 1, dtype=torch.int64), "ids: expected shape"),
        ("table", torch.zeros(4, 128, dtype=torch.float16), "table: expected torch.float32 or"),
        ("num_streams", 0, "num_streams: expected an integer >= 1"),
    ],
)
def test_names_the_bad_argument(name: str, value: Any, message: str) -> None:
    value = value.to(DEVICE) if isinstance(value, torch.Tensor) else value
    with pytest.raises(ValueError, match=message):
        ops.embed_streams(**(embedding_case(2, 4, 128, device=DEVICE) | {name: value}))
