"""Register a function as torch.ops.dsv4.<name>, with its fake, in one place."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any

import torch


def dsv4_op(fake: Callable[..., Any], mutates: Iterable[str] = ()) -> Callable[[Callable], Any]:
    """Make a function an op.

    fake     same arguments -> empty results of the right shape; returns None for an op that only
             changes tensors
    mutates  names of the arguments the op writes

    An eager call goes straight to the function: the torch.library boundary costs tens of
    microseconds a call, more than most kernels here. Under torch.compile the op is what gets
    recorded. The registered op is the attribute `op`, for torch.library.opcheck.
    """

    def decorate(fn: Callable) -> Any:
        op = torch.library.custom_op(f"dsv4::{fn.__name__}", fn, mutates_args=tuple(mutates))
        op.register_fake(fake)

        @wraps(fn)
        def call(*args: Any, **kwargs: Any) -> Any:
            return (op if torch.compiler.is_compiling() else fn)(*args, **kwargs)

        setattr(call, "op", op)  # noqa: B010 (a function has no declared attribute)
        return call

    return decorate
