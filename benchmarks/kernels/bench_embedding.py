"""The embedding kernel. `python -m benchmarks.kernels.bench_embedding [--json PATH]`

The baseline is torch.compile of the oracle.
"""

from collections.abc import Iterator
from functools import partial

import torch

from dsv4.ops.embedding import embed_streams
from dsv4.reference import mhc as reference
from dsv4.testing.bench import Case, CompiledOracle, Later, copies, later, run

V = 129280
SHAPES = [(8192, 4096), (1024, 4096), (64, 4096), (8, 4096), (1, 4096), (8192, 7168), (1, 7168)]


@later
def case(T: int, D: int, table: torch.Tensor, baseline: CompiledOracle) -> Case:
    """Distinct tokens, other ones in each call."""
    num_bytes = T * (8 + 2 * D * (1 + 4))
    count = min(V // T, copies(num_bytes, 96))
    ids = torch.randperm(V, device="cuda")[: T * count].view(count, T)
    sets = [{"ids": row.contiguous(), "table": table, "num_streams": 4} for row in ids]
    return Case(
        "embed_streams", {"T": T, "D": D}, [partial(embed_streams, **a) for a in sets],
        num_bytes, baseline=baseline.NAME, baseline_calls=baseline.calls(sets, T),
    )  # fmt: skip


def cases() -> Iterator[Later]:
    """Every row of this file."""
    baseline = CompiledOracle(reference.embed_streams)
    tables: dict[int, torch.Tensor] = {}
    for T, D in SHAPES:
        if D not in tables:
            tables = {D: torch.randn(V, D, device="cuda", dtype=torch.bfloat16)}
        yield case(T, D, tables[D], baseline)


if __name__ == "__main__":
    run(cases(), "The embedding kernel at the widths of V4-Flash and V4-Pro")
