"""Small steps between matrix products. `python -m benchmarks.kernels.bench_step [--json PATH]`

The baseline is torch.compile of the oracle.
"""

from collections.abc import Iterator
from functools import partial

from dsv4.core.kv_layout import KvRecord
from dsv4.ops.activation import gate_up_swiglu
from dsv4.ops.attention import latent_kv_norm_pack
from dsv4.reference.activation import gate_up_swiglu as swiglu_oracle
from dsv4.reference.paged_attention import latent_kv_norm_pack as pack_oracle
from dsv4.testing.bench import Case, CompiledOracle, Later, copies, later, run
from dsv4.testing.cases.activation import activation_case
from dsv4.testing.cases.attention import latent_kv_args

TOKENS = (8192, 1024, 64, 8, 1)
C = 512


@later
def swiglu_case(T: int, F: int, baseline: CompiledOracle) -> Case:
    num_bytes = 6 * T * F
    args = [activation_case(T, F, device="cuda") for _ in range(copies(num_bytes))]
    return Case(
        "gate_up_swiglu", {"T": T, "F": F}, [partial(gate_up_swiglu, **a) for a in args],
        num_bytes, baseline=baseline.NAME, baseline_calls=baseline.calls(args, T),
    )  # fmt: skip


@later
def pack_case(T: int, L: int, baseline: CompiledOracle) -> Case:
    num_bytes = T * (4 * (L + C) + KvRecord().nbytes)
    args = [latent_kv_args(T, L, device="cuda") for _ in range(copies(num_bytes))]
    return Case(
        "latent_kv_norm_pack", {"T": T, "L": L}, [partial(latent_kv_norm_pack, **a) for a in args],
        num_bytes, baseline=baseline.NAME, baseline_calls=baseline.calls(args, T),
    )  # fmt: skip


def cases() -> Iterator[Later]:
    """Every row of this file."""
    for F in (2048, 3072):
        baseline = CompiledOracle(swiglu_oracle)
        for T in TOKENS:
            yield swiglu_case(T, F, baseline)
    for L in (1024, 1536):
        baseline = CompiledOracle(pack_oracle)
        for T in TOKENS:
            yield pack_case(T, L, baseline)


if __name__ == "__main__":
    run(cases(), "Steps between matrix products.")
