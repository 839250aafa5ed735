"""The text that train_char_gpt.py learns: the sources of Python's own standard library, character by character."""

from __future__ import annotations

import hashlib
import string
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

ALPHABET = string.printable[:-2]
"""ASCII without the two control characters that no source needs; a character's token is its place here."""

HELD_OUT_EVERY = 10
"""Of the modules in alphabetical order, each tenth is kept for validation."""


@dataclass(frozen=True)
class Corpus:
    """Tokens are uint8 [n], places in `ALPHABET`."""

    train: Tensor
    validation: Tensor
    modules: int
    fingerprint: str
    """SHA-256 of both texts: another version of Python has other sources."""


def load() -> Corpus:
    """The top-level modules of the running Python's standard library, those that are pure ASCII.

    Raises:
        FileNotFoundError: where this Python comes without sources.
    """
    library = Path(sysconfig.get_paths()["stdlib"])
    parts: tuple[list[str], list[str]] = ([], [])
    modules = 0
    for path in sorted(library.glob("*.py")):
        text = path.read_bytes().decode("utf-8", errors="replace")
        if set(text) <= set(ALPHABET):
            modules += 1
            parts[modules % HELD_OUT_EVERY == 0].append(text)
    train, validation = ("".join(part) for part in parts)
    if not validation:
        raise FileNotFoundError(
            f"{library}: expected the sources of Python's standard library, found {modules} modules"
        )
    digest = hashlib.sha256(f"{train}\0{validation}".encode()).hexdigest()
    return Corpus(encode(train), encode(validation), modules, digest)


def encode(text: str) -> Tensor:
    """uint8 [len(text)]."""
    places = bytearray(256)
    for place, character in enumerate(ALPHABET):
        places[ord(character)] = place
    return torch.frombuffer(bytearray(text.encode("ascii").translate(places)), dtype=torch.uint8)


def decode(tokens: Tensor) -> str:
    """The text of tokens [n]."""
    return "".join(ALPHABET[token] for token in tokens.tolist())


def batch(tokens: Tensor, size: int, context: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Pieces from places that the generator draws, and the same pieces one character on: int64 [size, context] each."""
    starts = torch.randint(len(tokens) - context, (size, 1), generator=generator)
    pieces = tokens[starts + torch.arange(context + 1)].long()
    return pieces[:, :-1], pieces[:, 1:]
