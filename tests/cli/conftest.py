import signal

import pytest
import torch

from dsv4.cli.main import main
from dsv4.loader import write_checkpoint
from dsv4.testing.tiny import random_weights, tiny_config
from dsv4.testing.tokenizer import write_tokenizer


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def interruptible():
    """A test run in the background starts with SIGINT ignored, and so would its children."""
    old = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, old)


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    import os

    for name in [n for n in os.environ if n.startswith("DSV4_")]:
        monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> str:
    """A random checkpoint with every mechanism and a tokenizer; its context ends at 4,096."""
    folder = tmp_path_factory.mktemp("tiny")
    config = tiny_config(vocab_size=512, max_position_embeddings=4096)
    write_checkpoint(folder, config, random_weights(config), max_shard_bytes=1_000_000)
    write_tokenizer(folder)
    return str(folder)


@pytest.fixture
def dsv4(capsys):
    """Run a command line in this process: (exit code, stdout, stderr)."""

    def run(*argv: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main([str(a) for a in argv])
        out, err = capsys.readouterr()
        return code, out, err

    return run
