"""One training run: start it, hand over the data, keep the clock, stop it, and leave nothing of it behind."""

from __future__ import annotations

import os
import resource
import selectors
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from nightshift import sandbox
from nightshift.config import Config
from nightshift.data import Dataset
from nightshift.devices import Lease, Meter
from nightshift.handover import SOCKET_ENV, RunnerEnd, Settings
from nightshift.openrun import PAGE_BYTES
from nightshift.scorer import Server, tail
from nightshift.values import Candidate, Reject, Run, Stop

POLL_S = 0.25
SAVE_BYTES_PER_S = 100e6  # the slowest disk that a save window allows for
SAVE_SPARE_S = 5.0
HEADER_BYTES = 16 << 20  # what a safetensors file may hold beyond its tensors
LOG_LINES = 50


@dataclass(frozen=True)
class Live:
    """What a run is doing, for whoever watches. Seconds on the runner's clock."""

    phase: str  # starting, training, saving
    step: int = 0
    loss: float = float("nan")
    tokens: int = 0
    elapsed_s: float = 0.0


Watch = Callable[[Live], None]


@dataclass(frozen=True)
class Bench:
    """Where runs are made: the same for every run of a leg."""

    config: Config
    dataset: Dataset
    lease: Lease
    tier: sandbox.Tier
    cache: Path  # compile caches, shared by the runs


def grace_s(budget_s: float) -> float:
    """How far a run may outlive its budget: the batch in flight, and the machine's jitter."""
    return max(1.0, 0.05 * budget_s)


def train(candidate: Candidate, bench: Bench, server: Server, watch: Watch) -> Run:
    """Runs candidate.folder/train.py to its end. Reject where it crashes, hangs, overruns or breaks the contract.

    When this returns or raises, every process of the run is gone.
    """
    started = time.monotonic()
    settings = _settings(candidate, bench)
    log_path = candidate.folder / "run.log"
    with (
        _shards(bench.dataset) as files,
        RunnerEnd(candidate.folder / "run.sock", settings, files) as ear,
        log_path.open("ab") as log,
    ):
        process = sandbox.spawn(
            bench.tier,
            _command(settings.world_size, candidate.folder / "train.py"),
            candidate.folder,
            log,
            env=_environment(candidate, bench),
            writable=[bench.cache],
            ranks=settings.world_size,
        )
        meter = Meter(bench.lease, process.pid)
        try:
            _follow(ear, process, server, meter, started, bench.config, watch)
        except Reject as reason:
            raise Reject(reason.status, f"{reason}\n{tail(log_path, LOG_LINES)}".rstrip()) from None
        finally:
            if not sandbox.end(process):
                raise Stop(f"processes of run {candidate.task.number} outlive SIGKILL; `ps -ef` shows them")
    return _finished(candidate, ear, meter, started)


def _settings(candidate: Candidate, bench: Bench) -> Settings:
    config, dataset = bench.config, bench.dataset
    return Settings(
        seed=candidate.task.seed,
        device=bench.lease.kind,
        world_size=max(1, config.gpus),
        vocab_size=dataset.vocab_size,
        bos_id=dataset.bos_id,
        seq_len=config.seq_len,
        objective=config.objective,
        budget_s=config.budget_s,
        budget_steps=config.budget_steps,
        target_loss=config.target_loss,
        weights=str(candidate.folder / "weights.safetensors"),
        length=candidate.task.length,
    )


def _command(world_size: int, train_py: Path) -> list[str]:
    if world_size == 1:
        return [sys.executable, str(train_py)]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world_size}"]
    return [*torchrun, str(train_py)]


def _environment(candidate: Candidate, bench: Bench) -> dict[str, str]:
    caches = sandbox.cache_environment(bench.cache)
    return {**bench.lease.environment, **caches, SOCKET_ENV: str(candidate.folder / "run.sock")}


@contextmanager
def _shards(dataset: Dataset) -> Iterator[list[int]]:
    """Descriptors to hand over: the ranks' common clock page, then each shard and its document starts.

    The limit on open files also holds for those under way in sockets (unix(7)), which a shard is once for each rank.
    """
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    files = [os.memfd_create("nightshift-clock")]
    try:
        os.ftruncate(files[0], PAGE_BYTES)
        for shard, starts in zip(dataset.shards, dataset.doc_starts, strict=True):
            files += [os.open(shard, os.O_RDONLY), os.open(starts, os.O_RDONLY)]
        yield files
    finally:
        for fd in files:
            os.close(fd)


def _follow(
    ear: RunnerEnd,
    process: subprocess.Popen[bytes],
    server: Server,
    meter: Meter,
    started: float,
    config: Config,
    watch: Watch,
) -> None:
    """Listens until the weights are saved. Between begin and finish only the clock and the socket are looked at."""
    exited, look_at = os.pidfd_open(process.pid), 0.0
    ear.selector.register(exited, selectors.EVENT_READ)
    try:
        while not ear.saved:
            events = [key.fileobj for key, _ in ear.selector.select(POLL_S)]
            for source in events:
                if source != exited:
                    ear.handle(source)
            if events == [exited] and not ear.saved:
                raise Reject("crash", _ending(process.wait(), ear))
            if ear.all_waiting and server.ready:
                ear.begin()
            _check_clock(ear, started, config)
            if time.monotonic() >= look_at:
                meter.sample()
                watch(_live(ear, started))
                look_at = time.monotonic() + POLL_S
    finally:
        ear.selector.unregister(exited)
        os.close(exited)


def _ending(status: int, ear: RunnerEnd) -> str:
    """Why a run is over that ended by itself, or that its warden ended; the log's last line has the figures then."""
    if status in sandbox.OVERSTEPPED:
        return f"train.py was stopped: {sandbox.OVERSTEPPED[status]}"
    what = "run.finish()" if ear.finish is None else "its weights were saved"
    return f"train.py ended before {what}, exit status {status}"


def _check_clock(ear: RunnerEnd, started: float, config: Config) -> None:
    now = time.monotonic()
    if ear.begun_at is None:
        if now - started > config.startup_s:
            what = "train.py was not imported for scoring" if ear.all_waiting else "no batch was asked for"
            raise Reject("timeout", f"{what} within startup_s = {config.startup_s:.0f} s")
        return
    spare = grace_s(config.budget_s) if config.budget_steps is None else config.startup_s
    if (ear.finished_at or now) - ear.begun_at > config.budget_s + spare:
        raise Reject("timeout", f"trained for longer than its {config.budget_s:.0f} s and {spare:.1f} s of grace")
    if ear.finish is not None and ear.finished_at is not None and not ear.saved:
        window = SAVE_SPARE_S + min(ear.finish.bytes / SAVE_BYTES_PER_S, config.startup_s)
        if now - ear.finished_at > window:
            raise Reject("timeout", f"the weights were not saved within {window:.0f} s of run.finish()")


def _live(ear: RunnerEnd, started: float) -> Live:
    now = time.monotonic()
    if ear.begun_at is None:
        return Live("starting", elapsed_s=now - started)
    if ear.finished_at is None:
        return Live("training", ear.step, ear.loss, ear.tokens, now - ear.begun_at)
    return Live("saving", ear.step, ear.loss, ear.tokens, now - ear.finished_at)


def _finished(candidate: Candidate, ear: RunnerEnd, meter: Meter, started: float) -> Run:
    weights = candidate.folder / "weights.safetensors"
    assert ear.finish is not None and ear.begun_at is not None and ear.finished_at is not None
    try:
        found = weights.lstat()
    except OSError:
        raise Reject("invalid", "the run said that its weights are saved, and they are not there") from None
    if not stat.S_ISREG(found.st_mode):
        raise Reject("invalid", "the weights are not a regular file")
    if not 0 <= found.st_size - ear.finish.bytes <= HEADER_BYTES:
        raise Reject("invalid", f"the weights file has {found.st_size} bytes, the run announced {ear.finish.bytes}")
    return Run(
        candidate=candidate,
        weights=weights,
        steps=ear.finish.steps,
        tokens=ear.finish.tokens,
        startup_s=ear.begun_at - started,
        train_s=ear.finished_at - ear.begun_at,
        peak_memory_mb=meter.peak_mb,
        num_params=ear.finish.num_params,
        flops_per_token=ear.finish.flops_per_token,
        unhealthy=meter.unhealthy,
    )


def fault_in(files: Sequence[Path]) -> None:
    """Reads files once, so that no run waits for the disk on the clock."""
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.read(16 << 20):
                pass
