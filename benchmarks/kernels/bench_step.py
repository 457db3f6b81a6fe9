"""Small steps between matrix products. `python -m benchmarks.kernels.bench_step [--json PATH]`

The baseline is torch.compile of the oracle, of the packing one a copy of as many bytes.
"""

from collections.abc import Iterator
from functools import partial

import torch

from dsv4.core.kv_layout import KvRecord
from dsv4.ops.activation import gate_up_swiglu
from dsv4.ops.attention import latent_kv_norm_pack
from dsv4.reference import activation
from dsv4.testing.bench import COLD_BYTES, Case, copy_calls, run
from dsv4.testing.cases.activation import activation_case
from dsv4.testing.cases.attention import latent_kv_args

TOKENS = (1, 8, 64, 1024, 8192)
C = 512
MAX_COPIES = 48


def copies(num_bytes: int) -> int:
    """Sets of buffers to go round: enough to exceed L2, within reason."""
    return max(1, min(MAX_COPIES, -(-COLD_BYTES // num_bytes)))


def cases() -> Iterator[Case]:
    """Every row of this file."""
    for F in (2048, 3072):
        compiled = torch.compile(activation.gate_up_swiglu)
        for T in TOKENS:
            num_bytes = 6 * T * F
            args = [activation_case(T, F, device="cuda") for _ in range(copies(num_bytes))]
            calls = [partial(gate_up_swiglu, **a) for a in args]
            base = [partial(compiled, **a) for a in args]
            yield Case("gate_up_swiglu", {"T": T, "F": F}, calls, num_bytes,
                       baseline="torch.compile", baseline_calls=base)  # fmt: skip
    for L in (1024, 1536):
        for T in TOKENS:
            num_bytes = T * (4 * (L + C) + KvRecord().nbytes)
            args = [latent_kv_args(T, L, device="cuda") for _ in range(copies(num_bytes))]
            calls = [partial(latent_kv_norm_pack, **a) for a in args]
            yield Case("latent_kv_norm_pack", {"T": T, "L": L}, calls, num_bytes, baseline="copy",
                       baseline_calls=copy_calls(num_bytes, copies(num_bytes)))  # fmt: skip


if __name__ == "__main__":
    run(cases(), "Steps between matrix products.")
