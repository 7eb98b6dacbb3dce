"""`python loop.py status`: how the night stands, from its files alone, while it runs and after.

Nothing here waits for the loop, writes anything, or needs torch; a machine without a GPU has no GPU lines.
"""

from __future__ import annotations

import fcntl
import io
import json
import os
import time
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from nightshift import ledger, panels
from nightshift.ledger import State, clean
from nightshift.panels import Pulse, labelled
from nightshift.view import WIDEST, drawable

PLAIN_WIDTH = 160  # columns, where nobody says how wide the paper is


def show(root: Path) -> None:
    """Prints the status, in colour on a terminal."""
    if not drawable():
        print(status(root))
        return
    console = Console(highlight=False, markup=False, emoji=False)
    console.print(_compose(root, min(console.width, WIDEST)), width=min(console.width, WIDEST))


def status(root: Path) -> str:
    """How the newest night stands, or the one that runs: a few plain lines."""
    console = Console(file=io.StringIO(), width=PLAIN_WIDTH, color_system=None, highlight=False, legacy_windows=False)
    with console.capture() as captured:
        console.print(_compose(root, PLAIN_WIDTH))
    return "\n".join(text.rstrip() for text in captured.get().splitlines())


def _compose(root: Path, width: int) -> RenderableType:
    states = ledger.nights(root)
    locks = sorted((root / ".nightshift").glob("*/lock"))
    pids = {lock.parent.name: pid for lock in locks if (pid := holder(lock))}
    known = {state.night["tag"] for state in states}
    if begun := pids.keys() - known:  # not a line in the journal yet: data and devices come first
        tag = min(begun)
        return _told("night", f"{tag} is being prepared by process {pids[tag]}")
    if not states:
        return Text("no night yet; this begins one: python loop.py run")
    state = next((s for s in reversed(states) if s.night["tag"] in pids), states[-1])
    tag = state.night["tag"]
    folder, holds, now = root / ".nightshift" / tag, pids.get(tag), time.time()
    here = (folder / "journal.jsonl").exists()  # else it came with a clone, and cannot be taken up
    parts: list[RenderableType] = [panels.heading(state), _told("night", _standing(state, holds, here))]
    if holds:
        parts += [Text(), panels.running(state, _pulse(folder, state), now), Text()]
    parts += [panels.incumbent(state), panels.limits(state, now if holds else None)]
    parts += [labelled(f"GPU {number}", line) for number, line in enumerate(gpus())]
    if state.claim is not None:
        parts.append(_told("claim", _claim(state)))
    if state.rows:
        parts += [Text(), panels.results(state, width)]
    return Group(*parts, Text(), _told("next", _next(tag, holds, here and not state.closed), "bold"))


def _told(label: str, text: str, style: str = "") -> Table:
    """A label in the margin and words beside it, as many lines as they take."""
    grid = Table.grid()
    grid.add_column(width=panels.LABEL, style="dim")
    grid.add_column()
    grid.add_row(label, Text(text, style))
    return grid


def holder(lock: Path) -> str:
    """The process that runs a night, by its flock; nothing where none does.

    Asking takes a shared lock for some microseconds, when it is free: there is no way only to look.
    """
    try:
        fd = os.open(lock, os.O_RDONLY)
    except OSError:
        return ""
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return os.read(fd, 32).decode(errors="replace").strip() or "?"
    finally:
        os.close(fd)
    return ""


def _standing(state: State, pid: str | None, here: bool) -> str:
    if pid:
        return f"running, process {pid}"
    if state.closed or (state.over and not here):
        return "over"
    if not here:
        return "unfinished, and its journal is not here but published"
    if state.stopped is None:
        return "stopped: its process was killed; what it had finished is in the journal"
    return f"stopped: {clean(state.stopped['cause'])}"


def _pulse(folder: Path, state: State) -> Pulse | None:
    """What the run in flight said last, if that is about this run."""
    try:
        told = json.loads((folder / "live.json").read_text())
        pulse = Pulse(**{name: told[name] for name in Pulse.__dataclass_fields__})
    except (OSError, ValueError, KeyError):
        return None
    return pulse if state.running is not None and told["number"] == state.running.number else None


def _claim(state: State) -> str:
    claim = state.claim
    assert claim is not None
    if "test" not in claim:
        return str(claim["verdict"])
    test = claim["test"]
    delta, low, high = (panels.figure(state, test[name], "+") for name in ("delta", "low", "high"))
    return f"{claim['verdict']}: {delta} on test, 95% interval {low} to {high}, {claim['per_arm']} runs an arm"


def _next(tag: str, pid: str | None, resumable: bool) -> str:
    if pid:
        return f"python loop.py report in the morning; kill -INT {pid} stops the night now, its ledger whole"
    return f"python loop.py run --tag {tag}" if resumable else "python loop.py report"


def gpus() -> list[str]:
    """What each GPU of this machine is doing, by NVML; nothing on a machine without it."""
    import pynvml as nvml

    try:
        nvml.nvmlInit()
        return [_gpu(nvml.nvmlDeviceGetHandleByIndex(i)) for i in range(nvml.nvmlDeviceGetCount())]
    except nvml.NVMLError:
        return []


def _gpu(handle: object) -> str:
    import pynvml as nvml

    memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    line = f"{memory.used / 2**30:.1f} of {memory.total / 2**30:.0f} GiB   {nvml.nvmlDeviceGetName(handle)}"
    try:
        busy = nvml.nvmlDeviceGetUtilizationRates(handle).gpu
    except nvml.NVMLError:  # a slice of a GPU does not say
        return line
    return f"{busy:3d}% busy   {line}"
