"""The sampler. `python -m benchmarks.kernels.bench_sampling [--json PATH] [--only OP]`

The baselines are torch.argmax for greedy, and torch.compile of softmax over exponential noise for
the rest, behind a sort where there are filters. "peaked" logits fall off like a language model's,
"flat" ones are normal numbers: most of the vocabulary is kept, the worst case of a threshold.
"""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from dsv4.ops import sampling as ops
from dsv4.testing.bench import COLD_BYTES, Call, Case, nbytes, run
from dsv4.testing.cases.sampling import VOCAB, logit_rows, request_rows

BATCHES = 1, 8, 64, 256
MODES = {
    "greedy": {"temperature": 0.0},
    "plain": {"temperature": 0.6},
    "top_p": {"temperature": 0.6, "top_p": 0.95},
    "all": {"temperature": 0.6, "top_k": 50, "top_p": 0.95, "min_p": 0.01},
}


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


def baseline_calls(mode: str, logits: list[Tensor], rows: dict[str, Tensor]) -> list[Call]:
    """The same draws with PyTorch alone."""
    if mode == "greedy":
        return [partial(torch.argmax, x, 1) for x in logits]
    if mode == "plain":
        compiled = torch.compile(gumbel, dynamic=False)
        return [partial(compiled, x, rows["temperature"]) for x in logits]
    k = rows.get("top_k", torch.full_like(rows["seed"], VOCAB))
    return [partial(sorted_filters, x, rows["temperature"], k, rows["top_p"]) for x in logits]


def sample_cases(mode: str, kind: str, dtype: torch.dtype) -> Iterator[Case]:
    for B in BATCHES:
        rows = {k: x.cuda() for k, x in request_rows(B, **MODES[mode]).items()}
        made = logit_rows(min(B, 32), VOCAB, kind, B, dtype).cuda()
        first = made.repeat(-(-B // 32), 1)[:B].contiguous()
        num = max(1, min(48, -(-COLD_BYTES // nbytes(first))))
        logits = [first.roll(i, 0).roll(37 * i, 1).contiguous() for i in range(num)]
        shape = {"B": B, "V": VOCAB, "mode": mode, "logits": kind, "dtype": str(dtype)[6:]}
        yield Case(
            "sample", shape, [partial(ops.sample, x, **rows) for x in logits],
            nbytes(first), baseline="argmax" if mode == "greedy" else "torch",
            baseline_calls=baseline_calls(mode, logits, rows),
        )  # fmt: skip


def cases() -> Iterator[Case]:
    """Every row of this file."""
    for mode in MODES:
        yield from sample_cases(mode, "peaked", torch.float32)
    yield from sample_cases("greedy", "peaked", torch.bfloat16)
    yield from sample_cases("top_p", "flat", torch.float32)


if __name__ == "__main__":
    run(cases(), "The sampler at the vocabulary of DeepSeek-V4")
