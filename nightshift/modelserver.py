"""The untrusted half of scoring: imports train.py, loads the weights, writes logits into the scorer's buffer.

    python -m nightshift.modelserver SOCKET_FD READY_FD TRAIN_PY

Runs in the sandbox, without the held-out data and without targets. Whatever it says is checked by scoring.py.
"""

from __future__ import annotations

import importlib.util
import json
import mmap
import os
import socket
import struct
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

STATUS = struct.Struct("<iqqq")  # code, then what it speaks of: a row length, or the shape that came out
OK, WRONG_SHAPE = 0, 1
GO = struct.Struct("<i")  # rows to score
MAX_MESSAGE = 64 * 1024


def import_train(path: Path) -> ModuleType:
    """train.py as a module of that name."""
    spec = importlib.util.spec_from_file_location("train", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["train"] = module
    spec.loader.exec_module(module)
    return module


def map_buffers(message: dict[str, Any], fds: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """The scorer's buffers: tokens int64 [rows, row_len], logits float32 [rows, row_len, vocab]."""
    rows, row_len, vocab = message["rows"], message["row_len"], message["vocab"]
    if message["cuda"]:
        storages = [torch.UntypedStorage._new_shared_cuda(*_unhex(h)) for h in message["cuda"]]
        device = torch.device("cuda", 0)
        tokens = torch.empty(0, dtype=torch.int64, device=device).set_(storages[0])
        logits = torch.empty(0, dtype=torch.float32, device=device).set_(storages[1])
    else:
        tokens = torch.frombuffer(mmap.mmap(fds[0], 0), dtype=torch.int64)
        logits = torch.frombuffer(mmap.mmap(fds[1], 0), dtype=torch.float32)
    return tokens.view(rows, row_len), logits.view(rows, row_len, vocab)


def _unhex(handle: list[Any]) -> list[Any]:
    return [bytes.fromhex(part[4:]) if isinstance(part, str) else part for part in handle]


def serve(peer: socket.socket, train: ModuleType) -> None:
    """One conversation: load, say the row length, map the buffers, then logits for each request until the end."""
    request = json.loads(peer.recv(MAX_MESSAGE))
    device = torch.device(request["device"])
    model = train.load(Path(request["weights"]), device).eval()
    peer.send(STATUS.pack(OK, int(getattr(model, "row_len", request["seq_len"])), 0, 0))
    data, fds, _, _ = socket.recv_fds(peer, MAX_MESSAGE, 2)
    tokens, logits = map_buffers(json.loads(data), list(fds))
    while order := peer.recv(GO.size):
        (rows,) = GO.unpack(order)
        out = model(tokens[:rows])
        if out.dim() != 3 or out.shape[:2] != tokens[:rows].shape or out.shape[2] < logits.shape[2]:
            dims = [*out.shape, -1, -1, -1][:3]
            peer.send(STATUS.pack(WRONG_SHAPE, *dims))
            return
        logits[:rows] = out[:, :, : logits.shape[2]]
        if device.type == "cuda":
            torch.cuda.synchronize()
        peer.send(STATUS.pack(OK, rows, 0, 0))


def warm_up() -> None:
    """What a GPU's load() is likely to need, while there is time: context and compiler."""
    import torch._inductor.compile_fx

    torch.zeros(1, device="cuda")


def main() -> None:
    """Imports, says so, waits for the weights. What the candidate's code raises ends the process, and is in its log."""
    peer = socket.socket(fileno=int(sys.argv[1]))
    ready, train_py = int(sys.argv[2]), Path(sys.argv[3])
    train = import_train(train_py)
    if os.environ.get("CUDA_VISIBLE_DEVICES"):
        warm_up()
    os.write(ready, b"1")
    with torch.inference_mode():
        serve(peer, train)


if __name__ == "__main__":
    main()
