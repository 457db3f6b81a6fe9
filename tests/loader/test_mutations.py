"""Every known way to break a checkpoint is refused, by name, with a way out."""

from __future__ import annotations

import pytest

from dsv4.core.errors import CheckpointError, ConfigError
from dsv4.loader import Checkpoint
from dsv4.testing.mutate import MUTATIONS, Mutation


def problems_of(folder, stage: str):
    """The problems met up to `stage`; a ConfigError comes back as it is."""
    try:
        ck = Checkpoint.open(folder)
    except ConfigError as error:
        return error
    except CheckpointError as error:
        return list(error.problems)
    assert stage != "open", "opened without complaint"
    if stage == "verify":
        ck.load()
        return ck.verify(deep=True)
    with pytest.raises(CheckpointError) as caught:
        ck.load()
    return list(caught.value.problems)


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.name)
def test_mutation_is_refused(mutation: Mutation, copy_of) -> None:
    folder = copy_of(mutation.base)
    mutation.apply(folder)
    found = problems_of(folder, mutation.stage)
    if mutation.kind == "config":
        assert isinstance(found, ConfigError)
        assert (found.field, bool(found.fix)) == (mutation.where, True)
        return
    assert isinstance(found, list)
    wanted = [
        p
        for p in found
        if p.kind == mutation.kind
        and p.file.startswith(mutation.where)
        and (not mutation.tensor or p.tensor == mutation.tensor)
    ]
    assert wanted, f"expected {mutation.kind} in {mutation.where}, got {found[:5]}"
    assert all(p.fix and p.detail for p in found)
    assert all(str(p).isascii() and str(p).isprintable() for p in found)


def test_the_table_is_long_and_unambiguous() -> None:
    assert len(MUTATIONS) >= 60
    assert len({m.name for m in MUTATIONS}) == len(MUTATIONS)


@pytest.mark.parametrize("kind", sorted({m.base for m in MUTATIONS}))
def test_unbroken_bases_are_sound(kind: str, sound) -> None:
    ck = Checkpoint.open(sound(kind))
    assert ck.load()
    assert ck.verify(deep=True) == []


def test_all_problems_are_reported_at_once(copy_of) -> None:
    folder = copy_of("official")
    by_name = {m.name: m for m in MUTATIONS}
    for name in ("norm_f32", "expert_transposed", "scale_missing", "draft_unexpected"):
        by_name[name].apply(folder)
    found = problems_of(folder, "open")
    assert {p.kind for p in found} == {"dtype", "shape", "missing", "unexpected"}


def test_two_broken_headers_are_reported_at_once(copy_of) -> None:
    folder = copy_of("official")
    for path in sorted(folder.glob("*.safetensors"))[1:3]:
        path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(folder)
    files = {p.file[:11] for p in caught.value.problems}
    assert files == {"model-00002", "model-00003"}


def test_two_broken_values_are_reported_at_once(copy_of) -> None:
    folder = copy_of("official")
    by_name = {m.name: m for m in MUTATIONS}
    by_name["e8m0_nan"].apply(folder)
    by_name["tid2eid_negative"].apply(folder)
    found = problems_of(folder, "load")
    assert {p.kind for p in found} == {"scale", "value"}


def test_scale_problems_are_counted(copy_of) -> None:
    folder = copy_of("official")
    next(m for m in MUTATIONS if m.name == "expert_e8m0_nan").apply(folder)
    (problem,) = Checkpoint.open(folder).verify(deep=True)
    assert problem.detail == "1 of 512 scales are 0xFF (NaN in E8M0)"
