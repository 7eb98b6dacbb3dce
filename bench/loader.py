"""How fast one core turns shards into batches: python bench/loader.py

Prints tokens per second from memory-mapped shards to int64 batches in pageable memory, the path that a run takes on
its clock before the copy to a device. The shards are files of random tokens, read once beforehand, as a night does.
"""

from __future__ import annotations

import os
import platform
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from nightshift import data, devices  # noqa: E402
from nightshift.loader import Rows, Tokens  # noqa: E402

SHARDS, SHARD_TOKENS = 4, 25_000_000
SHAPES = [(256, 32), (1024, 64), (2048, 32)]  # seq_len, rows
SECONDS = 2.0


def shards(folder: Path) -> list[Tokens]:
    """Shards on disk, mapped, every page touched."""
    mapped = []
    for number in range(SHARDS):
        path = folder / f"{number}.bin"
        data.write_shard(path, np.random.default_rng(number).integers(8192, size=SHARD_TOKENS, dtype=np.uint16))
        mapped.append(data.read_shard_tokens(path))
        mapped[-1].sum()
    return mapped


def rate(mapped: list[Tokens], seq_len: int, rows: int) -> float:
    """Tokens a second of this thread's processor time, order and copy together."""
    source = Rows(mapped, seq_len, seed=1)
    order = source.order()
    batch = np.empty((rows, seq_len + 1), dtype=np.int64)
    source.fill(batch, order)
    tokens, started = 0, time.thread_time()
    while (used := time.thread_time() - started) < SECONDS:
        source.fill(batch, order)
        tokens += rows * seq_len
    return tokens / used


def main() -> None:
    """One line: the hardware, the versions, a rate for each shape."""
    os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
    with tempfile.TemporaryDirectory() as folder:
        mapped = shards(Path(folder))
        rates = [f"[{rows}, {seq_len}] {rate(mapped, seq_len, rows) / 1e6:,.0f}" for seq_len, rows in SHAPES]
    model = devices.cpu_name().rpartition(" (")[0]
    versions = f"Python {platform.python_version()}, numpy {np.__version__}"
    print(f"loader, million tokens per second per core by [rows, seq_len]: {'; '.join(rates)} ({model}; {versions})")


if __name__ == "__main__":
    main()
