"""Every op replaced by its oracle: layers, model and engine tested for what they themselves do.

The kernels are held against the same oracles in tests/kernels. With oracles the production path
computes in FP32 where its embedding table is FP32, so that it can be compared to 1e-5.
"""

from __future__ import annotations

import pkgutil
import sys
from collections.abc import Callable
from importlib import import_module

import pytest

import dsv4.engine
import dsv4.kernels
import dsv4.layers
import dsv4.model


def oracles() -> dict[str, Callable]:
    """Name of an op -> its oracle, as the kernels name it."""
    found = {}
    for _, name, is_package in pkgutil.walk_packages(dsv4.kernels.__path__, "dsv4.kernels."):
        reference = None if is_package else getattr(import_module(name), "REFERENCE", None)
        if reference is not None:
            module, _, function = reference.partition(":")
            found[function] = getattr(import_module(module), function)
    return found


def use_oracles(patch: pytest.MonkeyPatch) -> None:
    """Put the oracles in the place of the ops, wherever production code imported one."""
    by_name = oracles()
    for package in (dsv4.layers, dsv4.model, dsv4.engine):
        for _, name, _ in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            module = import_module(name)
            for attribute, value in list(vars(module).items()):
                if hasattr(value, "op") and attribute in by_name:
                    patch.setattr(sys.modules[name], attribute, by_name[attribute])
