"""Token shards into batches: every token once an epoch, in an order that the seed decides."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

Tokens = npt.NDArray[np.uint16]


class Rows:
    """Rows of seq_len + 1 tokens cut end to end from the shards (a row's last token is the next one's first).

    Documents run on within and across rows; less than one row at a shard's end is left over. Ranks take every
    world_size-th row of one common shuffle, which is drawn anew for each epoch.
    """

    def __init__(self, shards: Sequence[Tokens], seq_len: int, seed: int, rank: int = 0, world_size: int = 1) -> None:
        self.shards, self.seq_len, self.seed = list(shards), seq_len, seed
        self.rank, self.world_size = rank, world_size
        counts = [max(0, (len(s) - 1) // seq_len) for s in self.shards]
        self._firsts = np.cumsum([0, *counts])  # number of the first row of each shard
        self.num_rows = int(self._firsts[-1])
        if self.num_rows < world_size:
            raise ValueError(
                f"rows of {seq_len} tokens: the data holds {self.num_rows}, fewer than the {world_size} ranks"
            )

    def order(self) -> Iterator[int]:
        """Numbers of this rank's rows, without end."""
        epoch = 0
        while True:
            shuffle = np.random.default_rng((self.seed, epoch)).permutation(self.num_rows)
            usable = self.num_rows - self.num_rows % self.world_size
            yield from map(int, shuffle[self.rank : usable : self.world_size])
            epoch += 1

    def fill(self, batch: npt.NDArray[np.int64], order: Iterator[int]) -> None:
        """Writes the next rows of `order` into batch [rows, seq_len + 1]."""
        for row in batch:
            number = next(order)
            shard = int(np.searchsorted(self._firsts, number, side="right")) - 1
            start = (number - int(self._firsts[shard])) * self.seq_len
            row[:] = self.shards[shard][start : start + self.seq_len + 1]
