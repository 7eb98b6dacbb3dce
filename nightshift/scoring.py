"""The trusted half of scoring: tokens out, logits in, nats summed. One process, all night long.

    python -m nightshift.scoring SOCKET_FD SETUP_JSON

Bits per byte = total nats / (ln 2 × total bytes) over all scored tokens; a token's bytes are its raw length, and
tokens without bytes (special ones) are not scored, but in a time_to_target night, whose text is scored as the
speedrun scores it: every token once. The log-softmax is taken here, in float32, summed in float64.
"""

from __future__ import annotations

import fcntl
import json
import mmap
import os
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nightshift import audit, data
from nightshift.config import Config
from nightshift.modelserver import GO, OK, STATUS, WRONG_SHAPE
from nightshift.values import Reject

DIED = "the model server died importing train.py, in load() or in forward()"
LOGITS_BYTES = {"cuda": 4 << 30, "cpu": 128 << 20}
CHUNK_BYTES = {"cuda": 1 << 30, "cpu": 8 << 20}
AUDIT_ROWS = {"cuda": 256, "cpu": 16}  # asked at a time: few, for an audit keeps to its time


@dataclass
class Buffers:
    """What both sides see: tokens int64 [rows, row_len], logits float32 [rows, row_len, vocab]."""

    tokens: torch.Tensor
    logits: torch.Tensor
    fds: list[int]

    def message(self) -> dict[str, Any]:
        """How the other side maps them: descriptors on a CPU, IPC handles on CUDA (bytes: nothing to unpickle)."""
        rows, row_len, vocab = self.logits.shape
        cuda = [] if self.fds else [_hex(t.untyped_storage()._share_cuda_()) for t in (self.tokens, self.logits)]
        return {"rows": rows, "row_len": row_len, "vocab": vocab, "cuda": cuda}


def _hex(handle: tuple[Any, ...]) -> list[Any]:
    return ["hex:" + part.hex() if isinstance(part, bytes) else part for part in handle]


def make_buffers(device: torch.device, rows: int, row_len: int, vocab: int) -> Buffers:
    """As many rows as the logits buffer's size allows, at most `rows`. Sealed: to read a file cut short is fatal."""
    rows = max(1, min(rows, LOGITS_BYTES[device.type] // (row_len * vocab * 4)))
    if device.type == "cuda":
        tokens = torch.zeros(rows, row_len, dtype=torch.int64, device=device)
        return Buffers(tokens, torch.empty(rows, row_len, vocab, dtype=torch.float32, device=device), [])
    fds, views = [], []
    for dtype, count in [(torch.int64, rows * row_len), (torch.float32, rows * row_len * vocab)]:
        fd = os.memfd_create("nightshift-buffer", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(fd, count * dtype.itemsize)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        fds.append(fd)
        views.append(torch.frombuffer(mmap.mmap(fd, 0), dtype=dtype))
    return Buffers(views[0].view(rows, row_len), views[1].view(rows, row_len, vocab), fds)


class Scoring:
    """The process's state: the held-out rows, the bytes of every token, and the buffers of the last row length."""

    def __init__(self, setup: dict[str, Any]) -> None:
        self.device = torch.device("cuda", 0) if setup["device"] == "cuda" else torch.device("cpu")
        config = Config(**setup["config"])
        self.dataset = data.open_dataset(config)
        self.token_bytes = torch.from_numpy(self.dataset.token_bytes().astype(np.int64)).to(self.device)
        self.patience_s = config.startup_s
        self.deadline = 0.0  # for all that the model server of now has to say, by time.monotonic()
        self.consecutive = config.objective == "time_to_target"
        self.buffers: Buffers | None = None
        self.first_pass: dict[str, np.ndarray] = {}  # nats by split, as last scored; an audit compares with them

    def rows(self, split: str, row_len: int) -> np.ndarray:
        """The split as uint16 [rows, row_len + 1]; consecutive text is cut anew to the model's own row length."""
        packed = self.dataset.rows(split)
        if packed.shape[1] == row_len + 1:
            return packed
        total = packed.shape[0] * (packed.shape[1] - 1)
        longest = LOGITS_BYTES[self.device.type] // (4 * self.dataset.vocab_size)
        if not self.consecutive or not 1 <= row_len <= longest or total % row_len:
            fits = f"{packed.shape[1] - 1}" + f" or a divisor of {total}, at most {longest}" * self.consecutive
            raise Reject("invalid", f"the model asked for rows of {row_len} tokens; a row has {fits}")
        text = np.append(packed[:, :-1].reshape(-1), packed[-1, -1])
        return np.lib.stride_tricks.sliding_window_view(text, row_len + 1)[::row_len]

    def score(self, server: socket.socket, folder: Path, weights: str, splits: list[str]) -> dict[str, dict[str, Any]]:
        """Sums by split. The nats of every token go to <folder>/nats-<split>.npy, float32 [rows, row_len]."""
        row_len = self._greet(server, weights, splits)
        return {split: self._split(server, folder, split, self.rows(split, row_len)) for split in splits}

    def audit(self, server: socket.socket, weights: str, incumbent: str, seconds: float) -> dict[str, Any]:
        """Findings on the candidate that was scored last; `incumbent` is the file of nats to compare its gains with."""
        until = time.monotonic() + seconds
        row_len = self._greet(server, weights, ["val"])
        rows, first = self.rows("val", row_len).astype(np.int64), self.first_pass["val"]
        assert self.buffers is not None
        before = _nats_of(Path(incumbent), first.shape) if incumbent else None
        size = min(len(self.buffers.tokens), AUDIT_ROWS[self.device.type])

        def ask(inputs: np.ndarray, targets: np.ndarray) -> np.ndarray:
            given, wanted = (torch.from_numpy(x).to(self.device) for x in (inputs, targets))
            return self._batch(server, given, wanted).cpu().numpy()

        return asdict(audit.audit(ask, rows, first, before, self.dataset.vocab_size, size, until))

    def _greet(self, server: socket.socket, weights: str, splits: list[str]) -> int:
        """Has the weights loaded, and the buffers mapped; the length of the rows that the model takes."""
        self.deadline = time.monotonic() + self.patience_s * (1 + len(splits))
        request = {"weights": weights, "device": str(self.device), "seq_len": self.dataset.seq_len}
        server.send(json.dumps(request).encode())
        (row_len, *_) = self._status(server)
        first = self.rows(splits[0], row_len)
        if self.buffers is None or self.buffers.logits.shape[1] != row_len:
            for fd in self.buffers.fds if self.buffers else []:
                os.close(fd)
            self.buffers = None
            self.buffers = make_buffers(self.device, len(first), row_len, self.dataset.vocab_size)
        socket.send_fds(server, [json.dumps(self.buffers.message()).encode()], self.buffers.fds)
        return row_len

    def _split(self, server: socket.socket, folder: Path, split: str, rows: np.ndarray) -> dict[str, Any]:
        nats = np.zeros((rows.shape[0], rows.shape[1] - 1), dtype=np.float32)
        total, total_bytes, count = 0.0, 0, 0
        assert self.buffers is not None
        size = len(self.buffers.tokens)
        for start in range(0, len(rows), size):
            batch = torch.from_numpy(rows[start : start + size].astype(np.int64)).to(self.device)
            losses = self._batch(server, batch[:, :-1], batch[:, 1:])
            lengths = self.token_bytes[batch[:, 1:]]
            scored = (lengths > 0) | self.consecutive
            total += float(losses.double()[scored].sum())
            total_bytes += int(lengths.sum())
            count += int(scored.sum())
            nats[start : start + size] = losses.cpu().numpy()
        self.first_pass[split] = nats
        _save(folder / f"nats-{split}.npy", nats)
        return {"nats": total, "bytes": total_bytes, "tokens": count}

    def _batch(self, server: socket.socket, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Nats of each target, float32 [rows, row_len]. What the server leaves unwritten stays NaN, and is refused."""
        assert self.buffers is not None
        rows = len(inputs)
        self.buffers.tokens[:rows] = inputs
        logits = self.buffers.logits[:rows].fill_(float("nan"))
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        server.send(GO.pack(rows))
        self._status(server)
        return torch.cat([_nats(x, y) for x, y in self._chunks(logits, targets)])

    def _chunks(self, logits: torch.Tensor, targets: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Copies, since the server can go on writing: what is summed must be the logits that were looked at."""
        size = max(1, CHUNK_BYTES[self.device.type] // (logits[0].numel() * 4))
        for part, wanted in zip(logits.split(size), targets.split(size), strict=True):
            yield part.clone(), wanted

    def _status(self, server: socket.socket) -> tuple[int, int, int]:
        server.settimeout(max(1e-3, min(self.patience_s, self.deadline - time.monotonic())))
        try:
            reply = server.recv(STATUS.size + 1)
        except TimeoutError:
            raise Reject("timeout", f"the model did not load or answer within {self.patience_s:.0f} s") from None
        except ConnectionError:
            reply = b""
        if len(reply) != STATUS.size:
            raise Reject("crash", DIED)
        code, *what = STATUS.unpack(reply)
        if code == WRONG_SHAPE:
            shape = [d for d in what if d >= 0]
            expected = list(self.buffers.logits.shape) if self.buffers else []
            raise Reject("invalid", f"the logits have shape {shape}, expected up to {expected}")
        if code != OK:
            raise Reject("crash", f"the model server said {code}")
        return what[0], what[1], what[2]


def _nats(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    if not bool(torch.isfinite(logits).all()):
        raise Reject("invalid", "there is NaN or infinity in the logits")
    nats = torch.logsumexp(logits, -1) - logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    if not bool(torch.isfinite(nats).all()):
        raise Reject("invalid", "the logits lie so far apart that a loss is infinite in float32")
    return nats


def _nats_of(path: Path, shape: tuple[int, ...]) -> np.ndarray | None:
    """What an earlier run left, if it is of the same rows: it only steers where the audit looks first."""
    try:
        nats = np.load(path)
    except (OSError, ValueError):
        return None
    return nats if nats.shape == shape and nats.dtype == np.float32 and np.isfinite(nats).all() else None


def _save(path: Path, nats: np.ndarray) -> None:
    """Writes a new file: the run owns the folder, and may have left a link to somebody else's there."""
    try:
        path.unlink(missing_ok=True)
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    except (FileExistsError, IsADirectoryError, PermissionError, FileNotFoundError):
        raise Reject("invalid", f"{path.name}: the run stands in the way of the scorer's own file") from None
    with os.fdopen(fd, "wb") as file:
        np.save(file, nats)


def write_bytecode() -> None:
    """Where bytecode has a place of its own (sandbox.bytecode_environment): the compiler's, for the runs to read."""
    if sys.pycache_prefix:
        import torch._inductor.compile_fx  # noqa: F401
        import triton.language  # noqa: F401


def main() -> None:
    """Serves the loop until it hangs up."""
    write_bytecode()
    loop = socket.socket(fileno=int(sys.argv[1]))
    scoring = Scoring(json.loads(sys.argv[2]))
    server: socket.socket | None = None
    folder = Path()
    while True:
        message, fds, _, _ = socket.recv_fds(loop, 64 * 1024, 1)
        if not message:
            return
        request = json.loads(message)
        if "serve" in request:
            if server is not None:
                server.close()
            server, folder = socket.socket(fileno=fds[0]), Path(request["serve"])
            continue
        assert server is not None
        reply: dict[str, Any]
        try:
            with torch.inference_mode():
                if "audit" in request:
                    reply = {"audit": scoring.audit(server, **request["audit"])}
                else:
                    reply = {"scores": scoring.score(server, folder, **request["score"])}
        except Reject as reason:
            reply = {"status": reason.status, "reason": str(reason)}
        except (ConnectionError, TimeoutError):
            reply = {"status": "crash", "reason": DIED}
        loop.send(json.dumps(reply).encode())


if __name__ == "__main__":
    main()
