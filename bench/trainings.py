"""Runs of train.py by hand, seen from outside: what startup.py, scaling.py and ablation.py share."""

from __future__ import annotations

import math
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from machine import ROOT

from nightshift import sandbox

STEP = re.compile(r"step +(\d+)  loss (\S+)  \S+ tok/s  ([\d.]+) s")
FIGURE = re.compile(r"(\w+): +(nan|inf|[\d.]+)")
ENDLESS_S = 900.0  # beyond its budget, after which a run is ended


class Step(NamedTuple):
    at: float  # seconds since the process was started
    number: int
    loss: float
    elapsed: float  # seconds on the run's own clock, which the first batch starts


@dataclass(frozen=True)
class Training:
    """One run. Seconds are counted from the start of its process; all but `failure` may be empty or NaN after one."""

    steps: list[Step]
    figures: dict[str, float]  # of the block that is printed last
    scored_s: float
    whole_s: float
    errors: str  # what it wrote to stderr
    failure: str  # its last words, or "" where it was scored

    @property
    def first_batch_s(self) -> float:
        """When the clock began to run, by every line's own account."""
        return statistics.median(step.at - step.elapsed for step in self.steps) if self.steps else float("nan")

    def figure(self, name: str) -> float:
        return self.figures.get(name, float("nan"))

    def loss_at(self, step: int, over: int = 10) -> float:
        """Mean of the `over` steps before and at `step`: that of one step is of one batch."""
        losses = [s.loss for s in self.steps if step - over < s.number <= step]
        return statistics.fmean(losses) if len(losses) == over else float("nan")


def checkout(folder: Path, train_py: str | None = None) -> Path:
    """What a run by hand needs, in a folder of its own, with other text for train.py where it is given."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in (*sandbox.FACE, "train.py"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, folder / name)
    if (ROOT / "corpus").is_dir():
        (folder / "corpus").symlink_to((ROOT / "corpus").resolve())
    return folder


def environment(profile: str, budget_s: float, seed: int, cache: Path, gpus: Sequence[int] = ()) -> dict[str, str]:
    """For a run by hand that compiles into `cache`, as under the loop; on these GPUs alone, where they are given."""
    chosen = {"NIGHTSHIFT_PROFILE": profile, "NIGHTSHIFT_BUDGET_S": str(budget_s), "NIGHTSHIFT_SEED": str(seed)}
    devices = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    if gpus:
        devices["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, gpus))
    return {**os.environ, "PYTHONUNBUFFERED": "1", **devices, **chosen, **sandbox.cache_environment(cache)}


def train(folder: Path, env: Mapping[str, str], options: Sequence[str] = (), limit_s: float = math.inf) -> Training:
    """Runs the folder's train.py to its end, or for `limit_s`; `options` are the interpreter's."""
    began, steps, figures, words, scored_s = time.monotonic(), [], {}, [], float("nan")
    command = [sys.executable, *options, "train.py"]
    with (
        tempfile.TemporaryFile("w+", errors="replace") as errors,
        subprocess.Popen(command, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=errors, text=True) as process,
    ):
        assert process.stdout is not None
        deadline = threading.Timer(min(limit_s, float(env["NIGHTSHIFT_BUDGET_S"]) + ENDLESS_S), process.terminate)
        deadline.start()
        try:
            for line in process.stdout:
                at = time.monotonic() - began
                words.append(line.strip())
                if step := STEP.match(line):
                    steps.append(Step(at, int(step[1]), float(step[2]), float(step[3])))
                elif figure := FIGURE.fullmatch(line.strip()):
                    figures[figure[1]], scored_s = float(figure[2]), at
            code = process.wait()
        finally:
            deadline.cancel()
        errors.seek(0)
        said = errors.read()
    whole_s = time.monotonic() - began
    reason = (
        "" if "val_bpb" in figures else f"exit {code} after {whole_s:.0f} s: {last_words([*words, *said.splitlines()])}"
    )
    return Training(steps, figures, scored_s, whole_s, said, reason)


def last_words(lines: list[str]) -> str:
    """The last line that names an error, else the last one, shortened; of torchrun's own words none."""
    written = [line.strip() for line in lines if line.strip()]
    torchrun = next((n for n, line in enumerate(written) if "torch/distributed/elastic" in line), None)
    named = [line for line in written[:torchrun] if re.match(r"[\w.]*(Error|Exception|Interrupt)\b", line)]
    return (named or written[:torchrun] or ["nothing said"])[-1][:100]
