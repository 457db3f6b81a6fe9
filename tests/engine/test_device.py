"""Which devices tier 2 takes."""

import warnings

import pytest
import torch

from dsv4.core.errors import DeviceUnavailable
from dsv4.engine import model
from dsv4.engine.model import usable_device, warn_of_slow_kernels


def on_a_gpu(monkeypatch: pytest.MonkeyPatch, current: int, capability: tuple[int, int]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)


def test_the_current_hopper_or_blackwell(monkeypatch: pytest.MonkeyPatch) -> None:
    for capability in ((9, 0), (10, 0)):
        on_a_gpu(monkeypatch, 1, capability)
        assert usable_device("cuda") == usable_device("cuda:1") == torch.device("cuda", 1)


@pytest.mark.parametrize(
    ("device", "capability", "message"),
    [
        ("cuda:0", (9, 0), "the current device is cuda:1"),
        ("cuda", (8, 9), "its kernels need SM 9.0 or later, this is SM 8.9"),
        ("gpu", (9, 0), "expected cuda, cuda:N or cpu"),
    ],
)
def test_others_are_refused(
    monkeypatch: pytest.MonkeyPatch, device: str, capability: tuple[int, int], message: str
) -> None:
    on_a_gpu(monkeypatch, 1, capability)
    with pytest.raises(DeviceUnavailable, match=message) as caught:
        usable_device(device)
    assert caught.value.__notes__ == [f"-> {caught.value.fix}"]


def test_missing_cuda_kernels_are_told_where_they_would_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(model, "why_not", lambda: "needs NVRTC")
    on_a_gpu(monkeypatch, 0, (9, 0))
    with pytest.warns(RuntimeWarning, match="slower: needs NVRTC"):
        warn_of_slow_kernels(torch.device("cuda", 0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_slow_kernels(torch.device("cpu"))
        on_a_gpu(monkeypatch, 0, (10, 0))
        warn_of_slow_kernels(torch.device("cuda", 0))
        on_a_gpu(monkeypatch, 0, (9, 0))
        monkeypatch.setattr(model, "why_not", lambda: None)
        warn_of_slow_kernels(torch.device("cuda", 0))
