"""A checkout as a person has it, with a train.py that trains in a second, and the loop as a process of its own."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from repositories import git
from runs import BIGRAM

from nightshift.config import ROOT, Config
from nightshift.journal import parse
from nightshift.ledger import State, fold

PARTS = ("loop.py", "prepare.py", "program.md", "pyproject.toml", ".gitignore", "nightshift")
TRAIN = "LR = 10.0  # knob: log 1 100\n" + BIGRAM.replace("lr=10.0", "lr=LR")
TAG = "test"


def make(root: Path, tiny: Config, **profile: Any) -> Path:
    """A repository at `root` with one commit, whose profile `tiny` trains on the session's small data set."""
    root.mkdir(parents=True)
    for name in PARTS:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, root / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, root / name)
    document = yaml.safe_load((ROOT / "config.yaml").read_text())
    kept = {name: getattr(tiny, name) for name in ("source", "vocab_size", "seq_len", "val_tokens", "startup_s")}
    document["profiles"]["tiny"] = {"extends": "demo", "budget_steps": 20, "budget_s": 10.0, **kept, **profile}
    (root / "config.yaml").write_text(yaml.safe_dump(document))
    (root / "train.py").write_text(TRAIN)
    git(root, "init", "-q", "-b", "main")
    git(root, "add", "-A")
    git(root, "commit", "-qm", "start")
    return root


class Loop:
    """`python loop.py ...` in a checkout, as a process."""

    def __init__(self, root: Path, data_home: Path, *args: str, **env: str) -> None:
        self.root = root
        self.output = root.parent / f"{root.name}.out"
        kept = {k: v for k, v in os.environ.items() if k != "ANTHROPIC_API_KEY"}
        with self.output.open("w") as out:
            self.process = subprocess.Popen(
                [sys.executable, "loop.py", *args],
                cwd=root,
                env=kept | {"NIGHTSHIFT_DATA": str(data_home)} | env,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait(self, timeout: float = 120.0) -> int:
        """Its exit code."""
        return self.process.wait(timeout)

    def said(self) -> str:
        return self.output.read_text()

    def until(self, happened: Callable[[], bool], timeout: float = 60.0) -> None:
        """Waits for a condition; fails where the loop ends before it."""
        deadline = time.monotonic() + timeout
        while not happened():
            assert self.process.poll() is None, self.said()
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.01)

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


def call(root: Path, data_home: Path, *args: str, **env: str) -> tuple[int, str]:
    """Runs the loop to its end: exit code, and what it printed."""
    loop = Loop(root, data_home, *args, **env)
    return loop.wait(), loop.said()


def events(root: Path, tag: str = TAG) -> list[dict[str, Any]]:
    """The night's journal, as far as it is written."""
    path = root / ".nightshift" / tag / "journal.jsonl"
    return parse(path.read_bytes())[0] if path.exists() else []


def state(root: Path, tag: str = TAG) -> State:
    return fold(events(root, tag))


def processes(root: Path) -> list[str]:
    """Command lines of living processes that name this checkout or stand in it."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            where = os.readlink(entry / "cwd")
            zombie = (entry / "stat").read_text().rpartition(")")[2].split()[0] == "Z"
        except OSError:
            continue
        if not zombie and line and (str(root) in line or where.startswith(str(root))):
            found.append(line)
    return found
