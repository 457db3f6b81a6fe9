"""Every kernel file keeps the kernel contract."""

import inspect
import pkgutil
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
import torch

import dsv4.kernels
import dsv4.ops
from dsv4.core.dispatch import KernelSpec, select
from dsv4.core.errors import KernelUnavailable
from dsv4.kernels.common import cuda

MODULES = [
    import_module(name)
    for _, name, is_package in pkgutil.walk_packages(dsv4.kernels.__path__, "dsv4.kernels.")
    if not is_package
]
for _, name, _ in pkgutil.walk_packages(dsv4.ops.__path__, "dsv4.ops."):
    import_module(name)  # registers the ops
KERNELS = [m for m in MODULES if not m.__name__.startswith("dsv4.kernels.common.")]


def test_every_module_outside_common_is_a_kernel() -> None:
    assert KERNELS
    assert [m.__name__ for m in KERNELS if not hasattr(m, "SPEC")] == []
    names = [m.SPEC.name for m in KERNELS]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda m: m.SPEC.name)
def test_oracle_op_and_launch_take_the_same_arguments(kernel: ModuleType) -> None:
    module, _, name = kernel.REFERENCE.partition(":")
    oracle = list(inspect.signature(getattr(import_module(module), name)).parameters)
    schema = getattr(torch.ops.dsv4, name).default._schema
    assert [a.name for a in schema.arguments] == oracle
    launch = list(inspect.signature(kernel.launch).parameters)
    if schema.returns:
        assert list(inspect.signature(kernel.outputs).parameters) == oracle
        assert launch == [*oracle, "out"]
    else:
        assert not hasattr(kernel, "outputs")
        assert launch == [*oracle, *(["scratch"] if hasattr(kernel, "scratch") else [])]
        assert any(a.alias_info and a.alias_info.is_write for a in schema.arguments)


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda m: m.SPEC.name)
def test_one_name_and_its_parts(kernel: ModuleType) -> None:
    name = kernel.REFERENCE.partition(":")[2]
    assert kernel.SPEC.name.partition("/")[0] == name
    assert kernel.SPEC.launch is kernel.launch
    assert isinstance(kernel.CONFIG, dict)
    assert hasattr(kernel, f"{name}_kernel")
    assert Path(str(kernel.__file__)).stem.startswith(name)
    assert kernel.__doc__


def test_select_takes_the_first_that_fits_or_names_every_reason() -> None:
    needs_gpu = KernelSpec("op/cuda", print)
    anywhere = KernelSpec("op/triton", print, runs_on_cpu=True)
    assert select((needs_gpu, anywhere), torch.device("cpu")) is anywhere
    with pytest.raises(KernelUnavailable, match=r"op/cuda: needs a CUDA.*op/x: needs a CUDA"):
        select((needs_gpu, KernelSpec("op/x", print)), torch.device("cpu"))
    with pytest.raises(KernelUnavailable, match="the tensors are on meta"):
        select((anywhere,), torch.device("meta"))


def test_select_looks_at_the_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    blackwell, hopper = (KernelSpec(f"op/sm{n}0", print, arch=(n,)) for n in (10, 9))
    device = torch.device("cuda", 7)
    assert select((blackwell, hopper), device) is hopper
    with pytest.raises(KernelUnavailable, match="needs SM 10x, the device is SM 9x"):
        select((blackwell,), device)


def test_graphs_that_take_turns_share_counters(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three graphs, the second and third in turns; what is captured later is beyond all."""
    device = torch.device("cpu")
    monkeypatch.setattr(cuda, "_used", {device: 5})
    monkeypatch.setattr(cuda, "_bases", {})
    for used, top in ((100, 105), (300, 305), (20, 305)):
        with cuda.shared_counters(device):
            assert cuda._used[device] == 5
            cuda._used[device] += used
        assert cuda._used[device] == top
