"""Kernels run on the GPU if there is one, else on the CPU under Triton's interpreter."""

import os
from collections.abc import Iterator

import hypothesis
import pytest
import torch

# Triton reads this when a kernel is decorated, so it must be set before one is imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

torch.set_num_threads(1)

# The same examples for everybody: a red run can be repeated. `make stress` looks further.
hypothesis.settings.register_profile("repeatable", derandomize=True)
hypothesis.settings.register_profile("explore", print_blob=True)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what needs a CUDA device where there is none."""
    if torch.cuda.is_available():
        return
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    config.hook.pytest_deselected(items=gpu)
    items[:] = [item for item in items if item not in gpu]


@pytest.fixture(autouse=True)
def _give_memory_back(request: pytest.FixtureRequest) -> Iterator[None]:
    """Several test processes share a device: none keeps what only its largest test needed."""
    yield
    if request.node.get_closest_marker("gpu"):
        torch.cuda.empty_cache()
