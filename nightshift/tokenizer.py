"""Text to tokens: byte-level BPE, learned with rustbpe, applied with tiktoken, kept as one plain JSON file."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import tiktoken

Tokens = npt.NDArray[np.uint16]

BOS = "<|bos|>"
# GPT-4's split pattern with runs of at most two digits instead of three, as in nanochat: in a small vocabulary,
# a thousand entries for numbers are too many.
PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}"
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
GPT2_END_OF_TEXT = "<|endoftext|>"
# The regular expression engine recurses over a run of white space, and a million characters overflow its stack.
PIECE_CHARS = 100_000


@dataclass(frozen=True)
class Tokenizer:
    """Byte strings and their ids, which are their merge ranks too, and BOS, which no text encodes to.

    Ids that are neither have no bytes and never occur: a text too short to learn `vocab_size` merges from leaves some.
    """

    pattern: str
    ranks: dict[bytes, int]
    vocab_size: int
    bos_id: int

    @cached_property
    def encoding(self) -> tiktoken.Encoding:
        """This tokenizer as tiktoken's."""
        import tiktoken

        special = {BOS: self.bos_id}
        return tiktoken.Encoding("nightshift", pat_str=self.pattern, mergeable_ranks=self.ranks, special_tokens=special)

    def encode(self, texts: list[str]) -> list[Tokens]:
        """Each text as BOS and its tokens, on all cores."""
        encoding = self.encoding

        def document(text: str) -> Tokens:
            parts = [np.array([self.bos_id], dtype=np.uint32)]
            parts += [encoding.encode_to_numpy(piece, disallowed_special=()) for piece in _pieces(text)]
            return np.concatenate(parts).astype(np.uint16)

        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            return list(pool.map(document, texts))

    def token_bytes(self) -> npt.NDArray[np.int32]:
        """int32 [vocab_size]: how many bytes of text each id stands for; 0 for BOS."""
        lengths = np.zeros(self.vocab_size, dtype=np.int32)
        for token, rank in self.ranks.items():
            lengths[rank] = len(token)
        return lengths

    def save(self, path: Path) -> None:
        """Writes JSON: the pattern, vocab_size, bos_id, and the tokens in base64, in the order of their ids."""
        tokens = [base64.b64encode(token).decode() for token, _ in sorted(self.ranks.items(), key=lambda item: item[1])]
        document = {"pattern": self.pattern, "vocab_size": self.vocab_size, "bos_id": self.bos_id, "tokens": tokens}
        path.write_text(json.dumps(document, indent=0))

    @staticmethod
    def load(path: Path) -> Tokenizer:
        """Reads what `save` wrote."""
        document = json.loads(path.read_text())
        ranks = {base64.b64decode(token): rank for rank, token in enumerate(document["tokens"])}
        return Tokenizer(document["pattern"], ranks, document["vocab_size"], document["bos_id"])


def train(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Learns vocab_size - 1 tokens from `texts`, the 256 bytes among them; the last id is BOS."""
    import rustbpe

    learner = rustbpe.Tokenizer()
    pieces = (piece for text in texts for piece in _pieces(text))
    learner.train_from_iterator(pieces, vocab_size - 1, pattern=PATTERN)
    ranks = {bytes(token): rank for token, rank in learner.get_mergeable_ranks()}
    return Tokenizer(PATTERN, ranks, vocab_size, bos_id=vocab_size - 1)


def from_gpt2(vocab: dict[str, int]) -> Tokenizer:
    """GPT-2's tokenizer out of its vocab.json, where each character stands for a byte; ValueError if it is not that."""
    byte_of = _gpt2_bytes()
    words = {word: rank for word, rank in vocab.items() if word != GPT2_END_OF_TEXT}
    try:
        ranks = {bytes(byte_of[c] for c in word): rank for word, rank in words.items()}
        bos_id = vocab[GPT2_END_OF_TEXT]
    except KeyError as missing:
        raise ValueError(f"{missing} is not in the alphabet of GPT-2's vocabulary, or missing from it") from None
    if sorted(ranks.values()) != list(range(bos_id)):
        raise ValueError("the ids of GPT-2's vocabulary are not 0, 1, 2 ... with <|endoftext|> last")
    return Tokenizer(GPT2_PATTERN, ranks, bos_id + 1, bos_id)


def _gpt2_bytes() -> dict[str, int]:
    """The byte of each character in GPT-2's alphabet: itself where Latin-1 prints it, else from U+0100 up, in order."""
    printing = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [b for b in range(256) if b not in printing]
    return {chr(b): b for b in printing} | {chr(256 + n): b for n, b in enumerate(others)}


def _pieces(text: str) -> Iterator[str]:
    for start in range(0, len(text), PIECE_CHARS):
        yield text[start : start + PIECE_CHARS]
