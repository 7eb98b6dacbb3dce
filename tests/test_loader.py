"""Rows out of shards: all of them once an epoch, whatever the ranks, each the naive slice of its shard."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nightshift.loader import Rows, Tokens


def shards_of(lengths: list[int]) -> list[Tokens]:
    """Every token is its own place, so that a row tells where it was cut."""
    ends = np.cumsum([0, *lengths])
    return [np.arange(a, b, dtype=np.uint16) for a, b in zip(ends[:-1], ends[1:], strict=True)]


def naive(shards: list[Tokens], seq_len: int) -> list[tuple[int, ...]]:
    """The rows as the docstring has them: end to end, a row's last token the next one's first."""
    rows = []
    for shard in shards:
        for start in range(0, len(shard) - seq_len, seq_len):
            rows.append(tuple(shard[start : start + seq_len + 1].tolist()))
    return rows


def served(rows: Rows, count: int) -> list[tuple[int, ...]]:
    batch = np.empty((count, rows.seq_len + 1), dtype=np.int64)
    rows.fill(batch, rows.order())
    return [tuple(row) for row in batch.tolist()]


SHAPES = st.tuples(
    st.lists(st.integers(0, 200), min_size=1, max_size=5), st.integers(1, 40), st.integers(1, 4), st.integers(0, 2**31)
)


@given(SHAPES)
@settings(max_examples=150, deadline=None)
def test_an_epoch_serves_every_row_once_over_all_ranks(shape: tuple[list[int], int, int, int]) -> None:
    lengths, seq_len, world_size, seed = shape
    shards = shards_of(lengths)
    expected = naive(shards, seq_len)
    if len(expected) < world_size:
        with pytest.raises(ValueError, match=f"rows of {seq_len} tokens: the data holds {len(expected)}, fewer than"):
            Rows(shards, seq_len, seed, 0, world_size)
        return
    ranks = [Rows(shards, seq_len, seed, rank, world_size) for rank in range(world_size)]
    share = len(expected) // world_size
    for epoch in range(2):
        per_rank = [served(rows, 2 * share)[epoch * share : (epoch + 1) * share] for rows in ranks]
        together = [row for rank in per_rank for row in rank]
        assert len(set(together)) == len(together) == share * world_size  # disjoint, and none twice
        assert set(together) <= set(expected)
        if len(expected) % world_size == 0:
            assert set(together) == set(expected)


@given(SHAPES)
@settings(max_examples=50, deadline=None)
def test_ranks_deal_out_one_common_order(shape: tuple[list[int], int, int, int]) -> None:
    """The batch over all ranks is the same rows, however many ranks there are."""
    lengths, seq_len, world_size, seed = shape
    shards = shards_of(lengths)
    if (count := len(naive(shards, seq_len)) // world_size) == 0:
        return
    alone = served(Rows(shards, seq_len, seed), count * world_size)
    for rank in range(world_size):
        assert served(Rows(shards, seq_len, seed, rank, world_size), count) == alone[rank::world_size]


def test_seeds_and_epochs_differ_and_repeat() -> None:
    shards = shards_of([4000])
    orders = {seed: list(islice(Rows(shards, 10, seed).order(), 798)) for seed in (1, 2)}
    assert orders[1] != orders[2] and sorted(orders[1][:399]) == sorted(orders[2][:399]) == list(range(399))
    assert orders[1][:399] != orders[1][399:]
    assert orders[1] == list(islice(Rows(shards, 10, 1).order(), 798))
    assert orders[1] != list(range(399)) * 2


def test_a_shard_too_short_for_a_row_is_passed_over() -> None:
    shards = shards_of([5, 0, 12, 1, 11])
    assert sorted(served(Rows(shards, 10, 0), 2)) == [tuple(range(5, 16)), tuple(range(18, 29))]
