"""Every error shows its way out where Python users look: below the message of a traceback."""

from __future__ import annotations

import traceback

import pytest

from dsv4.core.errors import (
    CapacityError,
    CheckpointError,
    CheckpointProblem,
    ConfigError,
    DeviceUnavailable,
    Dsv4Error,
    KernelUnavailable,
    MissingExtra,
    RequestError,
)

ERRORS = {
    "config": ConfigError("hidden_size", "a multiple of 128", 100),
    "checkpoint": CheckpointError("missing", "a.safetensors", "w", "not there", "fetch it again"),
    "problems": CheckpointError.of([CheckpointProblem("json", "x", "", "no JSON", "mend it")] * 2),
    "capacity": CapacityError("pages", 3, 2),
    "device": DeviceUnavailable("cuda", "none"),
    "request": RequestError("prompt", "at most 4 tokens", 5, "shorten it"),
    "extra": MissingExtra("torch", "cuda"),
}


@pytest.mark.parametrize("error", ERRORS.values(), ids=ERRORS)
def test_a_traceback_ends_with_the_way_out(error: Dsv4Error) -> None:
    *_, message, last = traceback.format_exception_only(error)
    assert error.fix
    assert last == f"-> {error.fix}\n"
    assert str(error).splitlines()[-1] in message
    assert error.fix not in str(error)  # the command line prints both


def test_an_error_without_a_way_out_shows_none() -> None:
    for error in (KernelUnavailable("no kernel: reasons"), RequestError("n", "one", 2)):
        assert error.fix == ""
        assert traceback.format_exception_only(error)[-1].endswith(f"{error}\n")
