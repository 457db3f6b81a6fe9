"""The sampler. `python -m benchmarks.kernels.bench_sampling [--json PATH] [--only OP]`

The oracle goes row by row on the host, so the baselines are torch.compile of the same draws of a
batch: the largest logit for greedy, softmax over exponential noise for the rest, behind a sort
where there are filters. "peaked" logits fall off like a language model's, "flat" ones are normal
numbers: most of the vocabulary is kept, the worst case of a threshold.
"""

from collections.abc import Iterator
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from dsv4.ops import sampling as ops
from dsv4.testing.bench import Case, CompiledOracle, Later, Turns, copies, later, nbytes, run
from dsv4.testing.cases.sampling import VOCAB, logit_rows, request_rows

BATCHES = 8192, 1024, 64, 8, 1
FEW_BATCHES = 64, 1  # of what is not asked for every day
OTHER_ROWS = 32  # that differ by more than a rotation
MODES = {
    "greedy": {"temperature": 0.0},
    "plain": {"temperature": 0.6},
    "top_p": {"temperature": 0.6, "top_p": 0.95},
    "all": {"temperature": 0.6, "top_k": 50, "top_p": 0.95, "min_p": 0.01},
}


def greedy(logits: Tensor) -> Tensor:
    """The largest logit."""
    return logits.argmax(1)


def gumbel(logits: Tensor, temperature: Tensor) -> Tensor:
    """A draw without a seed: the largest share over exponential noise."""
    shares = (logits / temperature[:, None]).softmax(1)
    return (shares / torch.empty_like(shares).exponential_(1)).argmax(1)


def sorted_filters(logits: Tensor, temperature: Tensor, k: Tensor, p: Tensor) -> Tensor:
    """A draw after top-k and top-p by a sort of the whole row."""
    ordered, ids = logits.sort(dim=1, descending=True)
    rank = torch.arange(ordered.shape[1], device=ordered.device)
    shares = (ordered / temperature[:, None]).softmax(1)
    shares = torch.where(rank < k[:, None], shares, 0.0)
    before = shares.cumsum(1) - shares
    shares = torch.where(before < p[:, None] * shares.sum(1, keepdim=True), shares, 0.0)
    chosen = (shares / torch.empty_like(shares).exponential_(1)).argmax(1, keepdim=True)
    return ids.gather(1, chosen)


@cache
def some_rows(kind: str, dtype: torch.dtype) -> Tensor:
    return logit_rows(OTHER_ROWS, VOCAB, kind, 0, dtype).cuda()


def baseline_args(mode: str, logits: Tensor, rows: dict[str, Tensor]) -> dict[str, Any]:
    """Arguments of the baseline of a mode."""
    if mode == "greedy":
        return {"logits": logits}
    args = {"logits": logits, "temperature": rows["temperature"]}
    if mode == "plain":
        return args
    return args | {"k": rows.get("top_k", torch.full_like(rows["seed"], VOCAB)), "p": rows["top_p"]}


@later
def sample_case(
    B: int, mode: str, kind: str, dtype: torch.dtype, baseline: CompiledOracle
) -> Case:  # fmt: skip
    rows = {k: x.cuda() for k, x in request_rows(B, **MODES[mode]).items()}
    first = some_rows(kind, dtype).repeat(-(-B // OTHER_ROWS), 1)[:B].contiguous()
    logits = [first.roll(37 * i, 1) for i in range(copies(nbytes(first)))]
    shape = {"B": B, "V": VOCAB, "mode": mode, "logits": kind, "dtype": str(dtype)[6:]}
    return Case(
        "sample", shape, [partial(ops.sample, x, **rows) for x in logits],
        nbytes(first), baseline=f"{baseline.NAME} of a batch",
        baseline_calls=baseline.calls([baseline_args(mode, x, rows) for x in logits], B),
    )  # fmt: skip


def sample_cases(
    mode: str, kind: str, dtype: torch.dtype, batches: tuple[int, ...] = BATCHES
) -> Iterator[Later]:
    baseline = CompiledOracle({"greedy": greedy, "plain": gumbel}.get(mode, sorted_filters))
    for B in batches:
        yield sample_case(B, mode, kind, dtype, baseline)


def cases() -> Turns:
    """Every row of this file."""
    for mode in MODES:
        yield sample_cases(mode, "peaked", torch.float32)
    yield sample_cases("greedy", "peaked", torch.bfloat16, FEW_BATCHES)
    yield sample_cases("top_p", "flat", torch.float32, FEW_BATCHES)


if __name__ == "__main__":
    run(cases(), "The sampler at the vocabulary of DeepSeek-V4")
