"""What one forward step does to the cache: which rows go where. Host lists, device tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

PADDING = -1  # slot of a row that must not touch the cache


@dataclass(frozen=True)
class StepRows:
    """Metadata of the T token rows of a step, int64 on the device. Padding rows have slot -1.

    slot            [T] where the row's request keeps its state
    position        [T] of the token in its request
    end_position    [T] length of the request after the step
    first_row       [T] row of the request's first token in this step
    first_position  [T] position of that token
    """

    slot: Tensor
    position: Tensor
    end_position: Tensor
    first_row: Tensor
    first_position: Tensor

    @classmethod
    def build(
        cls,
        spans: Sequence[tuple[int, int, int]],
        num_rows: int | None = None,
        device: torch.device | str = "cpu",
    ) -> StepRows:
        """Rows of requests one after the other.

        spans     (slot, position of the first new token, number of new tokens) of each request
        num_rows  pad to this many rows; None for no padding
        """
        slot, position, end, row, first = [], [], [], [], []
        for s, start, n in spans:
            base = len(slot)
            slot += [s] * n
            position += range(start, start + n)
            end += [start + n] * n
            row += [base] * n
            first += [start] * n
        missing = 0 if num_rows is None else num_rows - len(slot)
        if missing < 0:
            raise ValueError(f"num_rows: expected at least {len(slot)}, got {num_rows}")
        pad = [0] * missing
        columns = (slot + [PADDING] * missing, position + pad, end + pad, row + pad, first + pad)
        rows = torch.tensor(columns, dtype=torch.int64).view(5, -1).to(device)
        return cls(*rows.unbind())
