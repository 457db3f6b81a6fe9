"""What an engine compiles before it is ready is all that it will ever need."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch

import dsv4.nano
from dsv4.core.inventory import of_trunk
from dsv4.core.sampling import SamplingParams
from dsv4.engine.drafting import DraftingStepper
from dsv4.engine.engine import Engine
from dsv4.engine.model import EngineLimits, ProductionModel
from dsv4.engine.stepper import Stepper
from dsv4.engine.warm_up import prompts, size_classes
from dsv4.kernels.common import cuda
from dsv4.loader import Checkpoint
from support.recorder import record_without_a_gpu
from support.specialisations import binaries


def nano(device: str = "cpu", with_mtp: bool = False, **fields: int) -> ProductionModel:
    checkpoint = Checkpoint.open(dsv4.nano.path())
    limits = EngineLimits(**{"max_context": 4096, "max_requests": 16} | fields)
    return ProductionModel(
        checkpoint.config,
        checkpoint.stream(keep=None if with_mtp else of_trunk),
        device, limits, with_mtp=with_mtp,
    )  # fmt: skip


@pytest.mark.parametrize("most", [1, 2, 16, 17, 50, 64, 2048])
def test_every_kind_of_size_is_there_in_every_span(most: int) -> None:
    sizes = size_classes(most)
    assert sizes == sorted(set(sizes))
    assert (sizes[0], sizes[-1]) == (1, most)

    def kind(n: int) -> tuple[int, int, bool]:
        return (n - 1).bit_length(), n % 2, n % 16 == 0

    assert {kind(n) for n in sizes} == {kind(n) for n in range(1, most + 1)}
    assert len(sizes) < 6 * most.bit_length()


@pytest.mark.skipif(
    torch.cuda.is_available(), reason="the interpreter is off; the last test is this one with a GPU"
)
@pytest.mark.parametrize("is_recorded", [False, True])
@pytest.mark.parametrize("with_mtp", [False, True])
def test_prompts_of_any_size_need_no_binary_that_the_warm_up_did_not(
    with_mtp: bool, is_recorded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    record_without_a_gpu(monkeypatch)
    model = nano(with_mtp=with_mtp)
    stepper = (DraftingStepper if with_mtp else Stepper)(model, use_graphs=is_recorded)
    with binaries() as warm:
        stepper.capture()
        stepper.warm_up()
    leaves_nothing(model)
    rng = random.Random(3)
    sizes = [*range(1, 70), *(rng.randint(70, 2048) for _ in range(50))]
    for num_rows in sizes:
        last = range(rng.randint(0, min(num_rows, 16)))
        padded = stepper.padded_prompt(num_rows)
        with binaries() as own, prompts(model, num_rows, padded) as step:
            assert step is not None
            stepper.prefill(step, [1] * num_rows, [2] * num_rows, last)
        new = [dict([("kernel", name), *rest]) for name, rest in own - warm]
        assert not new, (num_rows, len(last))


def leaves_nothing(model: ProductionModel) -> None:
    model.cache.check()
    assert model.cache.num_free_slots == model.cache.schema.num_slots
    assert model.cache.allocator.num_free == model.cache.schema.num_pages - 1


def test_a_small_cache_warms_up_with_what_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nano(max_context=400, max_requests=2, max_tokens=256)
    fed: list[int] = []

    def feed(self: Stepper, step: Any, ids: Sequence[int], *rest: Any) -> None:
        fed.append(len(ids))

    monkeypatch.setattr(Stepper, "prefill", feed)
    Stepper(model).warm_up()
    assert fed == sorted(fed, reverse=True)
    assert 258 <= fed[0] <= 768
    assert fed[-1] == 1
    leaves_nothing(model)


@pytest.mark.gpu
@pytest.mark.parametrize("with_mtp", [False, True])
def test_nothing_is_compiled_once_it_is_ready(with_mtp: bool) -> None:
    """Triton reports each binary that it makes or reads from its folder; NVRTC's are counted."""
    from triton import knobs

    model = nano("cuda", with_mtp)
    engine = Engine(model, DraftingStepper(model) if with_mtp else Stepper(model))
    compiled: list[str] = []

    def report(*, repr: str, **rest: Any) -> None:
        compiled.append(repr)

    before, old = cuda.load.cache_info().misses, knobs.runtime.jit_post_compile_hook
    knobs.runtime.jit_post_compile_hook = report
    try:
        rng = random.Random(0)
        params = [
            SamplingParams(temperature=0, max_tokens=9),
            SamplingParams(temperature=1.1, top_p=0.9, seed=1, max_tokens=5),
        ]
        for _ in range(20):
            for _ in range(rng.randint(1, 20)):
                n = rng.choice([rng.randint(1, 40), rng.randint(1, 900)])
                engine.add([rng.randrange(4096) for _ in range(n)], params[n % 2])
            while engine.has_work:
                engine.step()
    finally:
        knobs.runtime.jit_post_compile_hook = old
    assert not compiled
    assert cuda.load.cache_info().misses == before
