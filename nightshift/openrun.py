"""The run as train.py sees it: settings, batches, clock, finish. `prepare.open_run()` returns one.

It speaks through a line: `handover.RankEnd` under the loop, `byhand.ByHand` when a person runs train.py.
"""

from __future__ import annotations

import io
import mmap
import os
import random
import sys
import time
from collections import deque
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from nightshift import data
from nightshift.handover import Finish, Settings
from nightshift.loader import Rows, Tokens

if TYPE_CHECKING:
    import torch

PAGE_TICKS = 1 << 20  # batches that the shared clock page has room for
PAGE_BYTES = 8 * PAGE_TICKS
PINNED_BUFFERS = 4
LOG_LAG = 2  # steps


class Line(Protocol):
    """What a run needs of whoever runs it."""

    settings: Settings

    def begin(self) -> tuple[float, list[int]]: ...
    def log(self, step: int, loss: float, tokens: int) -> None: ...
    def finish(self, finish: Finish) -> None: ...
    def saved(self) -> None: ...


class OpenRun:
    """One training run, seen from inside. Before the data is asked for, nothing is on the clock."""

    def __init__(self, line: Line, rank: int, local_rank: int, total_steps: int | None) -> None:
        import torch

        s = line.settings
        self._line = line
        self.seed, self.rank, self.world_size = s.seed, rank, s.world_size
        self.device = torch.device("cpu") if s.device == "cpu" else torch.device("cuda", local_rank)
        self.vocab_size, self.bos_id, self.seq_len = s.vocab_size, s.bos_id, s.seq_len
        self.budget_s, self.objective, self.target_loss = s.budget_s, s.objective, s.target_loss
        wanted = total_steps if s.objective == "time_to_target" else None
        wanted = None if wanted is None else max(1, round(wanted * s.length))
        self.total_steps = s.budget_steps if s.budget_steps is not None else wanted
        self._t0: float | None = None
        self._page: np.ndarray | None = None
        self._shards: list[Tokens] = []
        self._doc_starts: list[np.ndarray] = []
        self._ticks, self._steps, self._tokens, self._progress = 0, 0, 0, 0.0
        self._own_batcher = True
        self._losses: deque[tuple[int, int, torch.Tensor, torch.cuda.Event]] = deque()
        self._sources: dict[int, tuple[Rows, Iterator[int]]] = {}  # by seq_len
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        random.seed(self.seed)
        np.random.seed(self.seed)
        torch.manual_seed(self.seed)

    def dummy_batch(self, rows: int, seq_len: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Random tokens (inputs, targets), int64 [rows, seq_len] on the device: compile and warm up on these."""
        import torch

        generator = torch.Generator().manual_seed(self.seed)
        tokens = torch.randint(self.vocab_size, (rows, seq_len + 1), generator=generator).to(self.device)
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def shards(self) -> tuple[list[Tokens], list[np.ndarray]]:
        """The token memmaps (uint16) and their documents' starts (uint32), for a batcher of train.py's own.

        The clock runs from the first call. progress() then counts its own calls as steps, so every rank must call
        it equally often.
        """
        if self._t0 is None:
            self._t0, fds = self._line.begin()
            clock, *files = fds
            self._page = np.frombuffer(mmap.mmap(clock, PAGE_BYTES), dtype=np.float64)
            os.close(clock)
            self._shards = [data.read_shard_tokens(fd) for fd in files[0::2]]
            self._doc_starts = [_load_npy(fd) for fd in files[1::2]]
            for fd in files:
                os.close(fd)
        return self._shards, self._doc_starts

    def batches(self, rows: int, seq_len: int, per_step: int = 1) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """(inputs, targets), int64 [rows, seq_len] on the device, until the budget is used; the first starts the clock.

        A step takes `per_step` of them: within it progress() stays, and it is never cut short. It ends on all ranks
        after the same step. Every token is served once before any is served twice, also where a schedule asks again,
        for batches of other `rows`.
        """
        shards, _ = self.shards()
        self._own_batcher = False
        if seq_len not in self._sources:
            source = Rows(shards, seq_len, self.seed, self.rank, self.world_size)
            self._sources[seq_len] = source, source.order()
        source, order = self._sources[seq_len]
        for number, (batch, copied) in enumerate(self._buffers(rows, seq_len)):
            if number % per_step == 0:
                self._tick()
                if self._progress >= 1.0:
                    return
            if copied is not None:
                copied.synchronize()  # the copy out of this buffer, some batches ago
            source.fill(batch.numpy(), order)
            self._tokens += rows * seq_len * self.world_size
            if copied is not None:
                batch = batch.to(self.device, non_blocking=True)
                copied.record()
            yield batch[:, :-1].contiguous(), batch[:, 1:].contiguous()

    def _buffers(self, rows: int, seq_len: int) -> Iterator[tuple[torch.Tensor, torch.cuda.Event | None]]:
        """Host batches to fill: fresh ones on a CPU, pinned ones in turn on a GPU, each with its copy's event."""
        import torch

        if self.device.type == "cpu":
            while True:
                yield torch.empty(rows, seq_len + 1, dtype=torch.int64), None
        pinned = [torch.empty(rows, seq_len + 1, dtype=torch.int64, pin_memory=True) for _ in range(PINNED_BUFFERS)]
        yield from cycle([(batch, torch.cuda.Event()) for batch in pinned])

    def _tick(self) -> None:
        """One step further. Rank 0 reads the clock and writes it on the page; the others read it there."""
        assert self._t0 is not None and self._page is not None
        step, self._ticks = self._ticks, self._ticks + 1
        if self.rank == 0:
            elapsed = self.elapsed()
            if self.world_size > 1:
                self._page[step % PAGE_TICKS] = elapsed or 1e-9
        else:
            while (elapsed := float(self._page[step % PAGE_TICKS])) == 0.0:
                time.sleep(1e-5)
        total = self.total_steps
        self._progress = min(1.0, step / total if total is not None else elapsed / self.budget_s)

    def elapsed(self) -> float:
        """Seconds on the clock; 0 before the first batch."""
        return 0.0 if self._t0 is None else time.monotonic() - self._t0

    def progress(self) -> float:
        """In [0, 1], of the budget or of total_steps, as of the step's first batch; the same on every rank."""
        if self._own_batcher and self._t0 is not None:
            self._tick()
        return self._progress

    def log(self, step: int, loss: float | torch.Tensor, tokens: int | None = None) -> None:
        """For the live view and the stop on NaN; never for the score. `tokens` is the total so far, over all ranks.

        A loss on a GPU is read LOG_LAG steps later, so that nobody waits for it. Waiting for that older one keeps the
        queue of the GPU short: what is trained keeps up with the clock, on every rank.
        """
        tokens = self._tokens if tokens is None else tokens
        if isinstance(loss, float) or not loss.is_cuda:
            return self._tell(step, float(loss), tokens)
        import torch

        copied = torch.cuda.Event()
        self._losses.append((step, tokens, loss.detach().to("cpu", non_blocking=True), copied))
        copied.record()
        if len(self._losses) > LOG_LAG:
            self._tell_oldest()

    def _tell_oldest(self) -> None:
        step, tokens, loss, copied = self._losses.popleft()
        copied.synchronize()
        self._tell(step, loss.item(), tokens)

    def _tell(self, step: int, loss: float, tokens: int) -> None:
        if self.rank == 0:
            self._line.log(step, loss, tokens)
            self._steps = step + 1

    def finish(self, model: torch.nn.Module) -> None:
        """Stops the clock and writes the weights; of several ranks, rank 0's. Nothing after it counts."""
        import torch
        from safetensors.torch import save_model

        if self.device.type == "cuda":
            torch.cuda.synchronize()
        while self._losses:
            self._tell_oldest()
        if self.rank != 0:
            return
        num_params = sum(p.numel() for p in model.parameters())
        flops = float(getattr(model, "flops_per_token", 6 * num_params))
        self._line.finish(Finish(_saved_bytes(model), self._steps or self._ticks, self._tokens, num_params, flops))
        path = Path(self._line.settings.weights)
        save_model(model, str(path.with_suffix(".part")))
        os.replace(path.with_suffix(".part"), path)
        sys.stdout.flush()
        sys.stderr.flush()
        self._line.saved()


def _saved_bytes(model: torch.nn.Module) -> int:
    """What save_model will write of tensors: memory that tied weights or views share counts once."""
    spans = sorted((t.data_ptr(), t.data_ptr() + t.nbytes) for t in model.state_dict().values())
    total, reached = 0, 0
    for start, stop in spans:
        total += max(0, stop - max(start, reached))
        reached = max(reached, stop)
    return total


def _load_npy(fd: int) -> np.ndarray:
    """The array in a .npy file. By pread: the descriptors of all ranks share one file offset."""
    return np.load(io.BytesIO(os.pread(fd, os.fstat(fd).st_size, 0)))
