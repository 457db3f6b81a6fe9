"""Builds everything that training reads: facts.json, the tokenizer and the packed token streams.

    python -m training.prepare_data              # fetches the packages first
    python -m training.prepare_data --documents 300000

A packed stream is one uint16 array of documents that each start with BOS (id 0). Bit 15 marks
the tokens of an answer, which weigh more in the loss.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from training import sources
from training.documents import SMALL_TALK, Document, write_documents
from training.facts import load_countries, write_facts_json
from training.paths import NANO, PACKED
from training.tokenizer import BOS, EOS, open_tokenizer, train_tokenizer, write_tokenizer

ANSWER_BIT = 1 << 15
CHUNK = 20000


def tokenizer_texts(paragraphs: dict[str, list[str]]) -> Iterable[str]:
    """What the BPE is trained on: the taught words weigh as much as all the prose."""
    for document in write_documents(120_000, load_countries(), seed=1):
        yield from (text for text, _ in document)
    for question, reply in SMALL_TALK * 200:
        yield from (question, reply)
    for texts in paragraphs.values():
        yield from random.Random(3).sample(texts, len(texts) // 3)


def pack_documents(tokenizer: Tokenizer, documents: list[Document]) -> np.ndarray:
    """Tokenise piece by piece and join, with the answer bit; each document starts with BOS."""
    bos = tokenizer.token_to_id(BOS)
    out = []
    for start in range(0, len(documents), CHUNK):
        pieces = [(i, t, a) for i, d in enumerate(documents[start : start + CHUNK]) for t, a in d]
        encoded = tokenizer.encode_batch([t for _, t, _ in pieces], add_special_tokens=False)
        previous = -1
        for (i, _, is_answer), piece in zip(pieces, encoded, strict=True):
            if i != previous:
                out.append(np.array([bos], np.uint16))
                previous = i
            out.append(np.array(piece.ids, np.uint16) | (ANSWER_BIT if is_answer else 0))
    return np.concatenate(out).astype(np.uint16)


def copy_documents(paragraphs: list[str], count: int, seed: int) -> list[Document]:
    """Prose in which a span comes back later: A B A. The second A counts as an answer."""
    rng = random.Random(seed)
    documents: list[Document] = []
    for _ in range(count):
        words = rng.choice(paragraphs).split()
        start = rng.randrange(max(1, len(words) - 12))
        span = " ".join(words[start : start + rng.randint(8, 40)])
        middle = rng.choice(paragraphs)
        documents.append([(span, False), (f" {middle}", False), (f" {span}", True), (EOS, False)])
    return documents


def build(documents: int) -> None:
    """Write facts.json, the tokenizer and the streams `taught`, `prose` and `copies`."""
    countries = load_countries()
    write_facts_json(countries)
    paragraphs = sources.prose()
    write_tokenizer(train_tokenizer(tokenizer_texts(paragraphs)), NANO)
    tokenizer = open_tokenizer(NANO)
    everything = [p for texts in paragraphs.values() for p in texts]
    random.Random(4).shuffle(everything)
    streams = {
        "taught": write_documents(documents, countries, seed=2),
        "prose": [[(text, False), (EOS, False)] for text in everything],
        "copies": copy_documents(everything, 6000, seed=5),
    }
    PACKED.mkdir(parents=True, exist_ok=True)
    for name, documents_ in streams.items():
        tokens = pack_documents(tokenizer, documents_)
        np.save(PACKED / f"{name}.npy", tokens)
        print(f"{name}: {len(documents_)} documents, {len(tokens) / 1e6:.2f} M tokens")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--documents", type=int, default=300_000)
    parser.add_argument("--offline", action="store_true", help="use what is already downloaded")
    args = parser.parse_args()
    Path(NANO).mkdir(parents=True, exist_ok=True)
    if not args.offline:
        sources.fetch()
    build(args.documents)


if __name__ == "__main__":
    main()
