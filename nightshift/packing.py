"""Held-out documents into full rows, cut once so that every candidate is scored on the same ones."""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Iterable
from itertools import count
from operator import itemgetter

import numpy as np

from nightshift.tokenizer import Tokens

BUFFER = 1000  # documents to choose from, as in nanochat


class HeldOut:
    """What is kept of a held-out split's documents: as much as its rows can need, in bounded memory.

    No packed row takes more than its seq_len + 1 tokens of a document, and two more than that tell that it did not
    fit. A row uses up documents for at most twice its length, since only the last one of it is cropped. Rows
    `end_to_end` hold all that is kept.
    """

    def __init__(self, seq_len: int, num_rows: int, end_to_end: bool = False) -> None:
        self.documents: list[Tokens] = []
        self._seq_len, self._num_rows, self._end_to_end = seq_len, num_rows, end_to_end
        self._longest = None if end_to_end else seq_len + 2
        self._missing = num_rows * seq_len + 1 if end_to_end else 2 * num_rows * (seq_len + 2)

    @property
    def full(self) -> bool:
        """Whether further documents would go unused."""
        return self._missing <= 0

    def add(self, document: Tokens) -> None:
        """Takes a document, which begins with BOS, unless it is full."""
        if not self.full:
            self.documents.append(document[: self._longest].copy())
            self._missing -= len(self.documents[-1])

    def rows(self) -> Tokens:
        """uint16 [at most num_rows, seq_len + 1]."""
        if not self._end_to_end:
            return pack(self.documents, self._seq_len, self._num_rows)
        tokens = np.concatenate([np.empty(0, dtype=np.uint16), *self.documents])
        return consecutive(tokens, self._seq_len, self._num_rows)


def consecutive(tokens: Tokens, seq_len: int, num_rows: int) -> Tokens:
    """[N, seq_len + 1] end to end: a row's last token is the next one's first, so that each is predicted once."""
    num_rows = min(num_rows, (len(tokens) - 1) // seq_len)
    if num_rows < 1:
        return np.empty((0, seq_len + 1), dtype=np.uint16)
    return np.lib.stride_tricks.sliding_window_view(tokens, seq_len + 1)[::seq_len][:num_rows]


def pack(documents: Iterable[Tokens], seq_len: int, num_rows: int) -> Tokens:
    """uint16 [at most num_rows, seq_len + 1]: rows without padding, each beginning with a document's first token.

    Best fit, as in nanochat's loader: the longest buffered document that fits whole; where none does, the shortest
    one, cropped, and its rest is dropped. Rows are fewer where the documents run out; the unfinished row is dropped.
    """
    rows = np.empty((num_rows, seq_len + 1), dtype=np.uint16)
    source, arrival = iter(documents), count()
    buffer: list[tuple[int, int, Tokens]] = []  # (length, arrival, document), sorted
    for number, row in enumerate(rows):
        filled = 0
        while filled < len(row):
            while len(buffer) < BUFFER and (document := next(source, None)) is not None:
                insort(buffer, (len(document), next(arrival), document))
            if not buffer:
                return rows[:number]
            room = len(row) - filled
            best = bisect_right(buffer, room, key=itemgetter(0)) - 1
            document = buffer.pop(max(best, 0))[2][:room]
            row[filled : filled + len(document)] = document
            filled += len(document)
    return rows
