"""The socket between a training run and its runner: begin, descriptors, clock, log, finish. Both ends are here.

A rank connects to a pathname socket in the run's folder (SOCK_SEQPACKET, JSON, one message a packet):

    rank → runner   {"hello": rank}             runner → rank   {"settings": {...}}
    rank → runner   {"begin": rank}             runner → rank   {"files": n, "t0": seconds} + descriptors, in parts
    rank → runner   {"log": [step, loss, tokens]}
    rank → runner   {"finish": {"bytes": ..., "steps": ..., "tokens": ..., ...}}, weights follow on disk
    rank → runner   {"saved": true}

The data is the clock: the shards' descriptors are sent when every rank has said `begin`, and time runs from there.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import selectors
import socket
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nightshift.values import Reject

MAX_MESSAGE = 64 * 1024  # bytes of JSON in one packet
MAX_FDS = 250  # the kernel takes 253 in one message
SOCKET_ENV = "NIGHTSHIFT_SOCKET"
EXPLODED = 4.0  # times the loss of a uniform guess
MAX_COUNT = 1 << 63  # of steps, tokens, bytes: JSON's whole numbers have no end, and a float's do


@dataclass(frozen=True)
class Settings:
    """What a run is told when it says hello. `budget_steps`, where set, replaces the seconds."""

    seed: int
    device: str  # "cpu" or "cuda"
    world_size: int
    vocab_size: int
    bos_id: int
    seq_len: int
    objective: str
    budget_s: float
    budget_steps: int | None
    target_loss: float
    weights: str  # the path that finish() writes
    length: float = 1.0  # times the total_steps that train.py asks for


@dataclass(frozen=True)
class Finish:
    """What a run says of itself at its end; for people, but for `bytes`, which the weights file must match."""

    bytes: int
    steps: int
    tokens: int
    num_params: int
    flops_per_token: float


def short_path(path: Path) -> tuple[int, str]:
    """A directory's descriptor and a name through it: an address holds 108 bytes, and a checkout may lie deep."""
    fd = os.open(path.parent, os.O_PATH | os.O_DIRECTORY)
    return fd, f"/proc/self/fd/{fd}/{path.name}"


def _send(sock: socket.socket, message: dict[str, Any], fds: Sequence[int] = (), flags: int = 0) -> None:
    data = json.dumps(message).encode()
    if fds:
        socket.send_fds(sock, [data], list(fds), flags)
    else:
        sock.send(data, flags)


class RankEnd:
    """A rank's end: it asks, and is told."""

    def __init__(self, path: Path, rank: int) -> None:
        self.rank = rank
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        directory, name = short_path(path)
        try:
            self._sock.connect(name)
        finally:
            os.close(directory)
        _send(self._sock, {"hello": rank})
        self.settings = Settings(**self._receive()[0]["settings"])

    def _receive(self) -> tuple[dict[str, Any], list[int]]:
        data, fds, _, _ = socket.recv_fds(self._sock, MAX_MESSAGE, MAX_FDS)
        if not data:
            raise ConnectionError("the runner closed the run's socket")
        return json.loads(data), list(fds)

    def begin(self) -> tuple[float, list[int]]:
        """Waits until every rank has begun. Returns the runner's monotonic time of it and the descriptors:

        the clock page, then token shard and document starts in turn.
        """
        _send(self._sock, {"begin": self.rank})
        message, fds = self._receive()
        while len(fds) < message["files"]:
            fds += self._receive()[1]
        return message["t0"], fds

    def log(self, step: int, loss: float, tokens: int) -> None:
        """Never waits: a full socket drops the line."""
        try:
            _send(self._sock, {"log": [step, loss, tokens]}, flags=socket.MSG_DONTWAIT)
        except BlockingIOError:
            return

    def finish(self, finish: Finish) -> None:
        """Stops the clock. The weights come next."""
        _send(self._sock, {"finish": asdict(finish)})

    def saved(self) -> None:
        """The weights are on disk; the runner may end this process from here on."""
        _send(self._sock, {"saved": True})


class RunnerEnd:
    """The runner's end: a listening socket, a connection a rank, and what they have said so far.

    Times are `time.monotonic()`. What a rank says is never trusted: a malformed message is Reject("invalid"),
    a loss that is not finite, or far above a uniform guess, is Reject("crash"). A rank that has hung up is forgotten.
    """

    def __init__(self, path: Path, settings: Settings, files: Sequence[int]) -> None:
        self.settings = settings
        self.selector = selectors.DefaultSelector()
        self.begun_at: float | None = None
        self.finished_at: float | None = None
        self.finish: Finish | None = None
        self.saved = False
        self.step, self.loss, self.tokens = 0, math.nan, 0
        self._files = list(files)
        self._ranks: dict[socket.socket, int] = {}
        self._waiting: set[int] = set()
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        directory, name = short_path(path)
        try:
            self._listener.bind(name)
        finally:
            os.close(directory)
        self._listener.listen(settings.world_size)
        self._listener.setblocking(False)
        self.selector.register(self._listener, selectors.EVENT_READ)

    def __enter__(self) -> RunnerEnd:
        return self

    def __exit__(self, *_: object) -> None:
        for sock in [*self._ranks, self._listener]:
            sock.close()
        self.selector.close()

    @property
    def all_waiting(self) -> bool:
        """Whether every rank has said begin and waits for the data."""
        return self.begun_at is None and len(self._waiting) == self.settings.world_size

    def handle(self, source: Any) -> None:
        """Serves one readable socket of the selector."""
        if source is self._listener:
            self._accept()
            return
        try:
            data, _, flags, _ = source.recvmsg(MAX_MESSAGE)
        except ConnectionError:
            data, flags = b"", 0
        if not data:
            self.selector.unregister(source)
            del self._ranks[source]
            source.close()
            return
        if flags & socket.MSG_TRUNC:
            raise Reject("invalid", f"the run sent a message of over {MAX_MESSAGE} bytes on its socket")
        try:
            message = json.loads(data)
            ((verb, value),) = message.items()
        except (ValueError, AttributeError, RecursionError):
            raise Reject("invalid", "the run sent a malformed message on its socket") from None
        self._hear(source, verb, value)

    def _accept(self) -> None:
        connection, _ = self._listener.accept()
        if len(self._ranks) == self.settings.world_size:
            connection.close()
            raise Reject("invalid", "the run opened more connections than it has ranks")
        connection.setblocking(False)
        self._ranks[connection] = -1
        self.selector.register(connection, selectors.EVENT_READ)

    def _hear(self, source: socket.socket, verb: str, value: Any) -> None:
        rank = self._ranks[source]
        known = type(value) is int and 0 <= value < self.settings.world_size
        if verb == "hello" and rank < 0 and known and value not in self._ranks.values():
            self._ranks[source] = value
            with contextlib.suppress(ConnectionError):
                _send(source, {"settings": asdict(self.settings)})
        elif verb == "begin" and rank >= 0 and value == rank and self.begun_at is None:
            self._waiting.add(rank)
        elif verb == "log" and rank == 0:
            self._log(value)
        elif verb == "finish" and rank == 0 and self.begun_at is not None and self.finish is None:
            self.finished_at = time.monotonic()
            self.finish = _finish(value)
        elif verb == "saved" and rank == 0 and self.finish is not None:
            self.saved = True
        else:
            raise Reject("invalid", f"the run said {str(verb)[:40]!r} on its socket where that makes no sense")

    def _log(self, value: Any) -> None:
        try:
            step, loss, tokens = value
            self.step, self.loss, self.tokens = _count(step), float(loss), _count(tokens)
        except (TypeError, ValueError, OverflowError):
            raise Reject("invalid", "the run logged something that is not [step, loss, tokens]") from None
        if not math.isfinite(self.loss):
            raise Reject("crash", f"the loss is {self.loss} at step {self.step}")
        if self.loss > EXPLODED * math.log(self.settings.vocab_size):
            raise Reject("crash", f"the loss exploded to {self.loss:.1f} at step {self.step}")

    def begin(self) -> float:
        """Hands out the data: the clock runs from here. Returns its zero."""
        self.begun_at = time.monotonic()
        message = {"files": len(self._files), "t0": self.begun_at}
        for sock, rank in self._ranks.items():
            if rank >= 0:
                with contextlib.suppress(ConnectionError):
                    for start in range(0, len(self._files), MAX_FDS):
                        _send(sock, message, self._files[start : start + MAX_FDS])
        return self.begun_at


def _count(value: Any) -> int:
    """A whole number that a run says, of a size that arithmetic can bear; else ValueError or its like."""
    count = int(value)
    if not 0 <= count < MAX_COUNT:
        raise ValueError(value)
    return count


def _finish(value: Any) -> Finish:
    try:
        finish = Finish(
            bytes=_count(value["bytes"]),
            steps=_count(value["steps"]),
            tokens=_count(value["tokens"]),
            num_params=_count(value["num_params"]),
            flops_per_token=float(value["flops_per_token"]),
        )
    except (TypeError, ValueError, KeyError, OverflowError):
        raise Reject("invalid", "the run's finish message is malformed") from None
    if not 0 <= finish.flops_per_token < math.inf:
        raise Reject("invalid", "the run's finish message is malformed")
    return finish
