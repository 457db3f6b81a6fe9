"""Every kernel file keeps the kernel contract."""

import inspect
import pkgutil
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
import torch

import dsv4.kernels
import dsv4.ops.cache

MODULES = [
    import_module(name)
    for _, name, is_package in pkgutil.walk_packages(dsv4.kernels.__path__, "dsv4.kernels.")
    if not is_package
]
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
        assert launch == oracle
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
