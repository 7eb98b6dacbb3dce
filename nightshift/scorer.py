"""Weights → bits per byte, in processes of their own. This is the loop's handle on them; it does not import torch.

    scoring.py      trusted: holds the held-out tokens and the targets, owns both buffers, lives all night
    modelserver.py  untrusted, sandboxed, one a run: imports train.py, loads the weights, writes logits

Neither trained the model, and the one that scores never runs its code.
"""

from __future__ import annotations

import json
import os
import select
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nightshift import config as configuration
from nightshift import sandbox
from nightshift.config import Config
from nightshift.devices import Lease
from nightshift.values import Reject, SplitScore, Stop

MAX_REPLY = 1 << 20
SCORING = {"OMP_WAIT_POLICY": "PASSIVE", "PYTHONDONTWRITEBYTECODE": ""}
UNSHARE_SAYS = "unshare: sigprocmask unblock failed: Invalid argument"  # util-linux 2.38, whenever its child was killed
SPARE_S = 60.0  # beyond what the scoring process allows a model server, before it is taken for dead itself


class Scorer:
    """The trusted scoring process, from the start of a leg to its end."""

    def __init__(self, config: Config, lease: Lease, tier: sandbox.Tier, folder: Path, cache: Path) -> None:
        self._config, self._lease, self._tier, self._cache = config, lease, tier, cache
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        setup = {"config": config.as_dict(), "device": lease.kind}
        self.log = folder / "scorer.log"
        with self.log.open("ab") as log:
            command = [sys.executable, "-m", "nightshift.scoring", str(theirs.fileno()), json.dumps(setup)]
            self._process = subprocess.Popen(
                [*sandbox.LIFELINE, *command],
                env=os.environ | lease.environment | sandbox.cache_environment(cache) | SCORING,
                cwd=configuration.ROOT,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        theirs.close()

    def __enter__(self) -> Scorer:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()
        sandbox.end(self._process)

    @contextmanager
    def serve(self, train_py: Path, folder: Path) -> Iterator[Server]:
        """A model server for one run, importing `train_py` from now on; gone when the block ends."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ready, imported = os.pipe()
        log_path = folder / "server.log"
        with log_path.open("wb") as log:
            process = sandbox.spawn(
                self._tier,
                [sys.executable, "-m", "nightshift.modelserver", str(theirs.fileno()), str(imported), str(train_py)],
                folder,
                log,
                env=self._lease.environment | sandbox.cache_environment(self._cache),
                writable=[self._cache],
                pass_fds=[theirs.fileno(), imported],
            )
        theirs.close()
        os.close(imported)
        try:
            with ours:
                self._send({"serve": str(folder)}, [ours.fileno()])
            yield Server(self, ready, log_path)
        finally:
            os.close(ready)
            sandbox.end(process)

    def _send(self, message: dict[str, Any], fds: Sequence[int] = ()) -> None:
        try:
            socket.send_fds(self._socket, [json.dumps(message).encode()], list(fds))
        except OSError:
            raise self._dead() from None

    def _receive(self, timeout: float) -> dict[str, Any]:
        self._socket.settimeout(timeout)
        try:
            reply = self._socket.recv(MAX_REPLY)
        except OSError:
            reply = b""
        if not reply:
            raise self._dead()
        return dict(json.loads(reply))

    def _dead(self) -> Stop:
        last = tail(self.log, 5).strip() or "(no output)"
        return Stop(f"the scorer has died or hangs; its last lines, from {self.log}:\n{last}\nthen: python loop.py run")


class Server:
    """One run's model server, as the loop sees it."""

    def __init__(self, scorer: Scorer, ready: int, log: Path) -> None:
        self._scorer, self.ready_fd, self._log = scorer, ready, log

    @property
    def ready(self) -> bool:
        """Whether it has imported train.py and waits, or has died trying: nothing of it will disturb the training."""
        readable = select.poll()  # select() takes no descriptor beyond 1023
        readable.register(self.ready_fd, select.POLLIN)
        return bool(readable.poll(0))

    def score(self, weights: Path, splits: Sequence[str]) -> dict[str, SplitScore]:
        """Scores the weights on held-out splits. Reject where the model cannot be loaded or its logits are no good."""
        self._scorer._send({"score": {"weights": str(weights), "splits": list(splits)}})
        reply = self._scorer._receive(self._scorer._config.startup_s * (1 + len(splits)) + SPARE_S)
        if "scores" in reply:
            return {split: SplitScore(**sums) for split, sums in reply["scores"].items()}
        raise self._rejected(reply)

    def audit(self, weights: Path, incumbent: Path | None, seconds: float) -> dict[str, Any]:
        """What `audit.audit` finds of the candidate scored last, on this server, a fresh one. Reject where it peeks."""
        asked = {"weights": str(weights), "incumbent": str(incumbent or ""), "seconds": seconds}
        self._scorer._send({"audit": asked})
        reply = self._scorer._receive(self._scorer._config.startup_s * 2 + seconds + SPARE_S)
        if "audit" in reply:
            return dict(reply["audit"])
        raise self._rejected(reply)

    def _rejected(self, reply: dict[str, Any]) -> Reject:
        return Reject(reply["status"], f"{reply['reason']}\n{tail(self._log, 50)}".rstrip())


def tail(path: Path, lines: int) -> str:
    """The last lines of a log, of at most 16 kB. A run may put something else in its place, which is not followed."""
    try:
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - 16_384))
            text = file.read().decode(errors="replace")
    except OSError:
        return ""
    return "\n".join([line for line in text.splitlines() if line != UNSHARE_SAYS][-lines:])
