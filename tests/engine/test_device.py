"""Which devices tier 2 takes."""

import pytest
import torch

from dsv4.core.errors import DeviceUnavailable
from dsv4.engine.model import usable_device


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
    with pytest.raises(DeviceUnavailable, match=message):
        usable_device(device)
