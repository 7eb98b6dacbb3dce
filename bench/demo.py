"""What the demo night costs beside its training: `python bench/demo.py`, in a checkout whose packages are installed.

Clones the checkout, takes its .venv along, prepares data anew, runs `make night` whole, and prints one line a figure.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

from nightshift.config import ROOT
from nightshift.devices import cpu_name


def loop_process(make: int) -> Path | None:
    """/proc entry of the loop below `make`, once it is there."""
    for children in Path(f"/proc/{make}/task").glob("*/children"):
        for pid in children.read_text().split():
            line = Path(f"/proc/{pid}/cmdline").read_bytes()
            return Path("/proc", pid) if b"loop.py" in line else loop_process(int(pid))
    return None


def peak_mb(process: Path | None) -> float:
    """VmHWM: the most that has been resident."""
    try:
        lines = (process / "status").read_text().splitlines() if process else []
    except OSError:
        lines = []
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM")), 0.0)


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        clone = Path(scratch, "clone")
        subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=True)
        (clone / ".venv").symlink_to(ROOT / ".venv")
        (ROOT / ".venv" / "installed").touch()
        env = os.environ | {"NIGHTSHIFT_DATA": str(Path(scratch, "data"))}
        env.pop("ANTHROPIC_API_KEY", None)
        began, began_at, memory = time.monotonic(), time.time(), 0.0
        command = ["make", "night", f"ARGS=--profile demo --tag bench {' '.join(sys.argv[1:])}"]
        with subprocess.Popen(command, cwd=clone, env=env, stdout=sys.stderr) as make:
            while make.poll() is None:
                memory = max(memory, peak_mb(loop_process(make.pid)))
                time.sleep(0.1)
        wall = time.monotonic() - began
        lines = (clone / ".nightshift/bench/journal.jsonl").read_text().splitlines()
        shutil.rmtree(clone / ".nightshift")
    events = [json.loads(line) for line in lines]
    start = next(e for e in events if e["event"] == "start")
    runs = [e for e in events if e["event"] == "decide"]
    trained = sum(e["train_s"] for e in runs)
    baselines = [e["score"] for e in runs[:3]]
    print(f"hardware               {cpu_name()}, Python {sys.version.split()[0]}, torch {version('torch')}")
    print(f"to the first batch     {start['at'] - began_at + runs[0]['startup_s']:.1f} s, data prepared from nothing")
    print(f"the night              {wall:.1f} s: {len(runs)} runs")
    print(f"share spent training   {100 * trained / wall:.1f}%")
    print(f"not training, a run    {statistics.median(e['total_s'] - e['train_s'] for e in runs):.2f} s (median)")
    print(f"loop's peak memory     {memory:.0f} MB")
    print(f"baselines              {', '.join(f'{y:.4f}' for y in baselines)} bits per byte, "
          f"mean {statistics.fmean(baselines):.4f}, σ {statistics.stdev(baselines):.4f}")


if __name__ == "__main__":
    main()
