"""Sound checkpoints on disk, one of each kind, written once a session."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from dsv4.loader import write_checkpoint
from support.checkpoints import SHARD_BYTES, config_of, weights_of

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def sound(tmp_path_factory: pytest.TempPathFactory):
    """sound(kind) -> a folder with a sound checkpoint. Never change it: copy it first."""
    root, made = tmp_path_factory.mktemp("sound"), {}

    def make(kind: str) -> Path:
        if kind not in made:
            made[kind] = root / kind
            write_checkpoint(made[kind], config_of(kind), weights_of(kind), SHARD_BYTES)
        return made[kind]

    return make


@pytest.fixture
def copy_of(sound, tmp_path: Path):
    """copy_of(kind) -> a fresh copy of a sound checkpoint, to break."""

    def make(kind: str) -> Path:
        return Path(shutil.copytree(sound(kind), tmp_path / "checkpoint"))

    return make
