"""What ahead-of-time compilation objects to."""

import pytest

from support.tools import tool

aot_ptx = tool("aot_ptx")

PRODUCT = (
    "wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 {%r1,%r2}, {%r3,%r4}, %rd1, p, 1, 1, 0;"
)
ON_MEMORY = PRODUCT.replace("{%r3,%r4}", "%rd2")
WAIT = "wgmma.wait_group.sync.aligned 0;"
SOME = WAIT.replace("0;", "7;")


def loop(*body: str) -> str:
    return "\n".join(["$L__BB0_1:", *body, "@%p1 bra \t$L__BB0_1;", WAIT])


@pytest.mark.parametrize(
    ("assembly", "found"),
    [
        (loop(PRODUCT), True), (loop(PRODUCT, SOME), True), (loop(WAIT, PRODUCT), True),
        (loop(PRODUCT, WAIT), False), (loop(ON_MEMORY), False), (loop(), False),
        ("\n".join([PRODUCT, "bra.uni $L__BB0_2;", "$L__BB0_2:", WAIT]), False),
    ],
)  # fmt: skip
def test_products_that_run_on_into_the_next_step(assembly: str, found: bool) -> None:
    assert aot_ptx.products_run_on(assembly) == found
    assert bool(aot_ptx.problem(assembly, {}, None)) == found
