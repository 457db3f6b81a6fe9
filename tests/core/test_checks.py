"""check_tensors names the argument, what was expected and what came."""

from __future__ import annotations

import pytest
import torch

from dsv4.core.checks import check_tensors

F32 = torch.float32


def test_letters_bind_and_must_agree() -> None:
    sizes = check_tensors(x=(torch.zeros(5, 24), "T 24", F32), y=(torch.zeros(5), "T", F32))
    assert sizes == {"T": 5}
    with pytest.raises(ValueError, match=r"y: expected shape \[T\] with \{'T': 5\}, got \[4\]"):
        check_tensors(x=(torch.zeros(5, 24), "T 24", F32), y=(torch.zeros(4), "T", F32))


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.zeros(5, 23), r"x: expected shape \[T 24\]"),
        (torch.zeros(24), r"x: expected shape \[T 24\]"),
        (torch.zeros(5, 24).double(), "x: expected torch.float32, got torch.float64"),
        (torch.zeros(24, 5).T, "x: expected a contiguous tensor"),
    ],
)
def test_the_bad_argument_is_named(tensor: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_tensors(x=(tensor, "T 24", F32))


def test_devices_must_agree() -> None:
    with pytest.raises(ValueError, match="y: expected device cpu, got meta"):
        check_tensors(x=(torch.zeros(1), "1", F32), y=(torch.zeros(1, device="meta"), "1", F32))
