"""Runs as tests make them: folders with a train.py, a run's end of the socket without torch, what is left of a run."""

from __future__ import annotations

import os
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from nightshift import runner
from nightshift.runner import Bench
from nightshift.scorer import Scorer, Server
from nightshift.values import Candidate, Reject, Run, Task

# A whole train.py: a table of bigrams, trained for real.
BIGRAM = """
import torch
from torch.nn import functional as F

class Bigram(torch.nn.Module):
    def __init__(self, vocab):
        super().__init__()
        self.table = torch.nn.Embedding(vocab, vocab)

    def forward(self, tokens):
        return self.table(tokens)

def main():
    import prepare
    run = prepare.open_run()
    model = Bigram(run.vocab_size)
    optimizer = torch.optim.SGD(model.parameters(), lr=10.0)
    for step, (x, y) in enumerate(run.batches(8, run.seq_len)):
        loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        run.log(step, loss.item())
    run.finish(model)

def load(weights, device):
    from safetensors.torch import load_model
    model = Bigram(300)
    load_model(model, weights)
    return model.to(device)

if __name__ == "__main__":
    main()
"""

# The same conversation with the runner, without torch: it starts in a tenth of a second.
BARE = """
import json, os, socket, struct, subprocess, sys, time
from pathlib import Path
from nightshift.handover import Finish, RankEnd

def finish(size=8, steps=1):
    line.finish(Finish(size, steps, 0, 0, 0.0))

line = RankEnd(Path(os.environ["NIGHTSHIFT_SOCKET"]), 0)
weights = Path(line.settings.weights)
raw = line._sock
"""

SAVE = "weights.write_bytes(bytes(8)); line.saved(); time.sleep(60)"


def bare(body: str) -> str:
    """A train.py that has said hello, and then does what `body` says."""
    return BARE + textwrap.dedent(body)


def candidate(folder: Path, train_py: str, seed: int = 1) -> Candidate:
    """Lays out a run's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "train.py").write_text(train_py)
    return Candidate(Task("candidate", number=1, seed=seed), "a test", "", "", folder)


@contextmanager
def no_server(scorer: Scorer, folder: Path) -> Iterator[Server]:
    """A model server that has died at its import: a run that is never scored need not wait for one."""
    ready, imported = os.pipe()
    os.close(imported)
    try:
        yield Server(scorer, ready, folder / "server.log")
    finally:
        os.close(ready)


def train(bench: Bench, scorer: Scorer, folder: Path, train_py: str, **changes: object) -> Run:
    """Trains under `bench`, whose config is changed as said, with nobody to score it."""
    bench = replace(bench, config=replace(bench.config, **changes))  # type: ignore[arg-type]
    with no_server(scorer, folder) as server:
        return runner.train(candidate(folder, train_py), bench, server, lambda live: None)


def rejection(bench: Bench, scorer: Scorer, folder: Path, train_py: str, **changes: object) -> tuple[str, str, float]:
    """Status, reason and seconds of a run that has to fail, of which nothing may be left."""
    started = time.monotonic()
    try:
        train(bench, scorer, folder, train_py, **changes)
    except Reject as reject:
        seconds = time.monotonic() - started
        assert alive(str(folder)) == []
        return reject.status, str(reject), seconds
    raise AssertionError("the run was accepted")


def alive(marker: str) -> list[str]:
    """Processes, this one aside, that have `marker` in their command line or environment."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            text = (process / "cmdline").read_bytes() + (process / "environ").read_bytes()
            zombie = "\nState:\tZ" in (process / "status").read_text()
        except OSError:
            continue
        if marker.encode() in text and not zombie and int(process.name) != os.getpid():
            found.append(f"{process.name}: {text[:200]!r}")
    return found


def gone(marker: str, within_s: float) -> bool:
    """Whether all such processes end in that time."""
    deadline = time.monotonic() + within_s
    while alive(marker):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True
