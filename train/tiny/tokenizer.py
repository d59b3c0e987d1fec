"""A CLIPTokenizer whose whole words are the tiny world's words; anything else falls to letters."""

import json
from itertools import pairwise
from pathlib import Path

from transformers import CLIPTokenizer

from train.tiny.render import (
    BACKGROUNDS,
    COLOURS,
    CONCEPTS,
    KNOWN_NOUNS,
    SHAPES,
    STYLES,
)

MAX_TOKENS = 16
START, END = "<|startoftext|>", "<|endoftext|>"

WORDS = [
    *("a", "an", "the", "of", "on", "in", "and", "with", "background", "style", "picture"),
    *("photo", "drawing", "small", "large", "left", "right", "center"),
    *COLOURS,
    *BACKGROUNDS,
    *SHAPES,
    *KNOWN_NOUNS,
    *(concept.word for concept in CONCEPTS.values()),
    *(style.word for style in STYLES.values()),
    *("striped", "dotted", "checkered", "framed", "sepia", "blueprint"),
    *("sks", "ohwx", "foo", "bar"),
]
"""One token each. The last ones are free words for adapters of the user's own."""


def write_tokenizer(folder: Path) -> CLIPTokenizer:
    """Write the vocabulary to the folder and load it back from there."""
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary, merges = _vocabulary()
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": MAX_TOKENS,
        "bos_token": START,
        "eos_token": END,
        "unk_token": END,
        "pad_token": END,
    }
    (folder / "vocab.json").write_text(json.dumps(vocabulary) + "\n")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    return CLIPTokenizer.from_pretrained(folder)


def _vocabulary() -> tuple[dict[str, int], list[str]]:
    """Byte-pair merges that end in one token for every word.

    Each word first goes through the merges so far; new ones then join what is left of it.
    Older merges go first when a text is read, so a new merge never breaks an older word.
    """
    letters = [chr(code) for code in range(33, 127)]
    tokens = dict.fromkeys(letters + [letter + "</w>" for letter in letters])
    ranks: dict[tuple[str, str], int] = {}
    for word in WORDS:
        pieces = _merge([*word[:-1], word[-1] + "</w>"], ranks)
        while len(pieces) > 1:
            ranks[pieces[0], pieces[1]] = len(ranks)
            pieces = [pieces[0] + pieces[1], *pieces[2:]]
            tokens[pieces[0]] = None
    tokens |= {START: None, END: None}
    numbered = {token: number for number, token in enumerate(tokens)}
    return numbered, [f"{left} {right}" for left, right in ranks]


def _merge(pieces: list[str], ranks: dict[tuple[str, str], int]) -> list[str]:
    """Byte-pair encoding: join the pair of lowest rank until no pair has one."""
    while pairs := [pair for pair in pairwise(pieces) if pair in ranks]:
        best = min(pairs, key=ranks.__getitem__)
        i = list(pairwise(pieces)).index(best)
        pieces = [*pieces[:i], "".join(best), *pieces[i + 2 :]]
    return pieces
