import pytest
import torch

from dsv4.cli.session import Session
from dsv4.core.sampling import SamplingParams
from dsv4.reference.sampler import TokenRng
from dsv4.testing.tiny import tiny_config
from dsv4.testing.tokenizer import write_tokenizer
from dsv4.text.tokenizer import Tokenizer

SEED = 11


class Uniform:
    """A model that finds every token equally likely, so that the draw alone decides."""

    config, device = tiny_config(vocab_size=512), torch.device("cpu")

    def new_cache(self):
        return None

    def forward(self, ids, cache, last_only=False):
        return torch.zeros(1, self.config.vocab_size)


@pytest.fixture
def session(tmp_path):
    write_tokenizer(tmp_path)
    return Session(Uniform(), Tokenizer.open(tmp_path), frozenset())


def draw(session, prompt, count):
    params = SamplingParams(temperature=1.0, seed=SEED, max_tokens=count)
    return [step.token_id for step in session.generate(prompt, params, 4096)]


def test_each_token_is_drawn_with_the_number_of_its_own_position(session):
    ids = draw(session, [0, 5, 7], 20)
    expected = [int(TokenRng(SEED, position).uniform() * 512) for position in range(3, 23)]
    assert ids == expected
    assert len(set(ids)) > 10


def test_a_kept_cache_changes_no_draw(session):
    first = draw(session, [0, 5, 7], 4)
    prompt = [0, 5, 7, *first, 9]
    kept = draw(session, prompt, 6)
    assert session.stats.prefill_tokens < len(prompt)
    session.reset()
    assert draw(session, prompt, 6) == kept
    assert session.stats.prefill_tokens == len(prompt)
