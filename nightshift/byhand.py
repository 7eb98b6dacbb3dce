"""train.py without the loop: the same clock and the same score, kept by the process itself.

    python train.py                                           the profile that fits the machine
    NIGHTSHIFT_PROFILE=local NIGHTSHIFT_SEED=7 python train.py

NIGHTSHIFT_BUDGET_S shortens or lengthens the run.
"""

from __future__ import annotations

import math
import os
import shutil
import sys
import time
from pathlib import Path

from nightshift import config as configuration
from nightshift import data, devices, sandbox, scorer
from nightshift.handover import Finish, Settings
from nightshift.openrun import PAGE_BYTES
from nightshift.publish import summary_block
from nightshift.values import Candidate, Reject, Run, Score, Stop, Task


class ByHand:
    """The line of a run that nobody watches: it opens the shards itself, and has itself scored at the end."""

    def __init__(self, rank: int, world_size: int) -> None:
        try:
            self._open(rank, world_size)
        except Stop as stop:
            print(stop, file=sys.stderr)
            sys.exit(stop.code)

    def _open(self, rank: int, world_size: int) -> None:
        profile = os.environ.get("NIGHTSHIFT_PROFILE") or devices.default_profile()
        budget = os.environ.get("NIGHTSHIFT_BUDGET_S")
        self._config = configuration.load(profile=profile, budget_s=float(budget) if budget else None)
        self._dataset = data.open_dataset(self._config)
        self._rank, self._world_size = rank, world_size
        self._folder = configuration.ROOT / ".nightshift" / "by-hand"
        self._folder.mkdir(parents=True, exist_ok=True)
        self._started = time.monotonic() - _process_age()
        self._t0 = 0.0
        self._finish: Finish | None = None
        self._train_s = 0.0
        self.settings = Settings(
            seed=int(os.environ.get("NIGHTSHIFT_SEED", "1")),
            device="cuda" if self._config.gpus else "cpu",
            world_size=world_size,
            vocab_size=self._dataset.vocab_size,
            bos_id=self._dataset.bos_id,
            seq_len=self._config.seq_len,
            objective=self._config.objective,
            budget_s=self._config.budget_s,
            budget_steps=self._config.budget_steps,
            target_loss=self._config.target_loss,
            weights=str(self._folder / "weights.safetensors"),
        )

        if self.settings.device == "cpu" and "OMP_NUM_THREADS" not in os.environ:
            import torch

            torch.set_num_threads(devices.threads())

    def begin(self) -> tuple[float, list[int]]:
        """Opens clock page and shards; ranks of one torchrun share the page by name."""
        files = [self._clock_page()]
        for shard, starts in zip(self._dataset.shards, self._dataset.doc_starts, strict=True):
            files += [os.open(shard, os.O_RDONLY), os.open(starts, os.O_RDONLY)]
        if self._world_size > 1:
            import torch.distributed as dist

            dist.barrier()
        self._t0 = time.monotonic()
        return self._t0, files

    def _clock_page(self) -> int:
        run_id = os.environ.get("TORCHELASTIC_RUN_ID", str(os.getpid()))
        path = self._folder / f"clock-{run_id}"
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        os.ftruncate(fd, PAGE_BYTES)
        if self._world_size > 1:
            import torch.distributed as dist

            dist.barrier()  # every rank holds it
        if self._rank == 0:
            path.unlink()
        return fd

    def log(self, step: int, loss: float, tokens: int) -> None:
        """A line of progress, rewritten in place on a terminal."""
        if not math.isfinite(loss):
            sys.exit(f"the loss is {loss} at step {step}")
        elapsed = time.monotonic() - self._t0
        end = "\r" if sys.stdout.isatty() else "\n"
        print(f"step {step:5d}  loss {loss:.4f}  {tokens / elapsed:,.0f} tok/s  {elapsed:.1f} s", end=end, flush=True)

    def finish(self, finish: Finish) -> None:
        """Stops the clock."""
        self._train_s = time.monotonic() - self._t0
        self._finish = finish

    def saved(self) -> None:
        """Scores the weights as a night would, and prints the summary block."""
        assert self._finish is not None
        finish, weights = self._finish, Path(self.settings.weights)
        candidate = Candidate(Task("baseline", seed=self.settings.seed), "by hand", "", "", self._folder)
        peak_mb = devices.peak_memory_mb_of_this_process(self.settings.device)
        startup_s = self._t0 - self._started
        run = Run(
            candidate,
            weights,
            finish.steps,
            finish.tokens,
            startup_s,
            self._train_s,
            peak_mb,
            finish.num_params,
            finish.flops_per_token,
        )
        with (
            devices.lease(self._world_size if self._config.gpus else 0, wait=False) as lease,
            scorer.Scorer(self._config, lease, sandbox.probe(), self._folder, self._folder.parent / "cache") as judge,
        ):
            try:
                train_py = Path(shutil.copy(sys.argv[0], self._folder / "train.py"))
                with judge.serve(train_py, self._folder) as server:
                    splits = server.score(weights, ("val",))
            except Reject as reason:
                sys.exit(f"no score: {reason}")
        score = Score(splits, self._train_s)
        print(summary_block(run, score, time.monotonic() - self._started, lease.peak_flops))


def _process_age() -> float:
    """Seconds since this process started."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    uptime = float(Path("/proc/uptime").read_text().split()[0])
    return uptime - ticks / os.sysconf("SC_CLK_TCK")
