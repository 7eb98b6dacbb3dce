"""What a run may hold: memory, processes, disk. Each bound, and what happens without it."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from boxes import BEST, LANDLOCK, NOTHING, TIERS, attempt, run
from runs import SAVE, alive, bare, rejection, train

from nightshift import sandbox
from nightshift.runner import Bench
from nightshift.sandbox import Tier
from nightshift.scorer import Scorer
from nightshift.warden import DISK, MEMORY, TASKS, machine_memory

MB = 1 << 20
DONE = f"line.begin(); finish(); {SAVE}"


def bounded(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    monkeypatch.setattr(sandbox, "BOUNDS", replace(sandbox.BOUNDS, **changes))


def memory(size: int) -> float:
    """The share of this machine's memory that is so many bytes."""
    return size / machine_memory()


# ---- in a run: the reason says which bound it was, the log how far


@pytest.mark.parametrize("tier", TIERS)
def test_a_run_that_takes_too_much_memory_is_stopped(
    bench: Bench, scorer: Scorer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tier: str
) -> None:
    """Also where no process alone takes much."""
    bench = replace(bench, tier=TIERS[tier])
    body = """
    for _ in range(4):
        if not os.fork():
            held = os.urandom(1 << 20) * 80
            time.sleep(60)
    time.sleep({hold})
    """
    assert train(bench, scorer, tmp_path / "off", bare(body.format(hold=1.5) + DONE)).train_s < 5
    bounded(monkeypatch, memory_share=memory(256 * MB))
    status, why, _ = rejection(bench, scorer, tmp_path / "on", bare(body.format(hold=15) + DONE))
    assert status == "crash"
    assert why.startswith("train.py was stopped: its processes held more memory than a run may\n")
    assert "GB of memory held, and a run may hold 0.25 GB" in why


def test_forked_workers_are_not_counted_twice(tmp_path: Path) -> None:
    script = """
    import os, time
    held = os.urandom(1 << 20) * 150
    for _ in range(3):
        os.fork()
    time.sleep(1.5)
    """
    how = replace(sandbox.BOUNDS, memory_share=memory(400 * MB))
    assert run(tmp_path / "run", script, bounds=how) == (0, "")


@pytest.mark.parametrize("where", ["home/part", "home/deep/deeper/part", "cache"])
def test_a_run_that_fills_the_disk_is_stopped(
    bench: Bench, scorer: Scorer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """In files that are small each; in its own folder, and in the caches that it shares with others."""
    target = str(bench.cache / "part") if where == "cache" else where
    body = f"""
    Path({target!r}).parent.mkdir(parents=True, exist_ok=True)
    for number in range(12):
        Path({target!r} + str(number)).write_bytes(os.urandom(1 << 20) * 8)
    time.sleep({{hold}})
    """
    assert train(bench, scorer, tmp_path / "off", bare(body.format(hold=1) + DONE)).train_s < 5
    for left in bench.cache.glob("part*"):
        left.unlink()
    bounded(monkeypatch, disk_bytes=64 * MB)
    status, why, _ = rejection(bench, scorer, tmp_path / "on", bare(body.format(hold=15) + DONE))
    assert status == "crash" and why.startswith("train.py was stopped: it wrote more to disk than a run may\n")
    assert "GB written, and a run may write 0.06 GB" in why
    for left in bench.cache.glob("part*"):
        left.unlink()


def test_a_run_cannot_pretend_to_have_been_stopped(bench: Bench, scorer: Scorer, tmp_path: Path) -> None:
    for code in (MEMORY, TASKS, DISK):
        _, why, _ = rejection(bench, scorer, tmp_path / str(code), bare(f"sys.exit({code})"))
        assert why == "train.py ended before run.finish(), exit status 1"


# ---- what the kernel holds it to


def test_one_file_has_an_end(tmp_path: Path) -> None:
    """Nothing of it is written: an error in the run, at once."""
    how = replace(sandbox.BOUNDS, disk_bytes=64 * MB)
    expression = "os.truncate(os.open('big', os.O_CREAT | os.O_WRONLY), 65 << 20)"
    assert attempt(tmp_path / "on", expression, bounds=how) == "OSError"
    assert attempt(tmp_path / "off", expression, bounds=how, without=["disk"]) == "None"


def test_files_without_a_name_are_seen_by_the_space_they_take(tmp_path: Path) -> None:
    free = os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize
    script = """
    import os, time
    fd = os.open("big", os.O_CREAT | os.O_WRONLY)
    os.unlink("big")
    for _ in range(40):
        os.write(fd, os.urandom(1 << 20) * 10)
    os.fsync(fd)
    time.sleep({hold})
    """
    how = replace(sandbox.BOUNDS, least_free=1 - 200 * MB / free)
    code, said = run(tmp_path / "on", script.format(hold=15), bounds=how)
    assert code == DISK and "GB left on the disk" in said
    assert run(tmp_path / "off", script.format(hold=1), bounds=how, without=["disk"]) == (0, "")


def test_so_has_the_number_of_files(tmp_path: Path) -> None:
    script = "import time\nfor n in range(900): open('home/%d' % n, 'w').close()\ntime.sleep({hold})"
    how = replace(sandbox.BOUNDS, files=500)
    assert run(tmp_path / "on", script.format(hold=15), bounds=how)[0] == DISK
    assert run(tmp_path / "off", script.format(hold=1))[0] == 0


STORM = """
import os, threading, time
made = 0
try:
    for made in range(900):
        if os.fork() == 0:
            time.sleep(60)
except OSError as error:
    print(made, error.strerror)
else:
    print("all")
time.sleep({rest})
"""


def test_processes_have_a_last_number(tmp_path: Path) -> None:
    """For root by kernel.pid_max of the namespace, where Linux has that; for others by RLIMIT_NPROC."""
    how = replace(sandbox.BOUNDS, tasks=500)
    code, said = run(tmp_path / "on", STORM.format(rest=0), bounds=how)
    made, _, why = said.partition(" ")
    assert made.isdigit() and int(made) < 500 and "Resource temporarily unavailable" in why or code == TASKS
    assert run(tmp_path / "off", STORM.format(rest=0), bounds=how, without=["tasks"]) == (0, "all\n")


@pytest.mark.parametrize("tier", [LANDLOCK, NOTHING], ids=str)
def test_a_storm_of_processes_is_ended_where_there_is_no_namespace(tmp_path: Path, tier: Tier) -> None:
    how = replace(sandbox.BOUNDS, tasks=500)
    code, said = run(tmp_path / "on", STORM.format(rest=15), tier, bounds=how)
    assert code == TASKS or "Resource temporarily unavailable" in said
    assert run(tmp_path / "off", STORM.format(rest=0), tier, bounds=how, without=["tasks"]) == (0, "all\n")


BOMB = """
import os, time
end = time.monotonic() + 30
while time.monotonic() < end:
    try:
        os.fork()
    except OSError:
        pass
"""


@pytest.mark.parametrize("tier", TIERS)
def test_a_fork_bomb_is_over_within_seconds(tmp_path: Path, tier: str) -> None:
    """What grows without end, and would starve whoever ends it; without a bound it is left untried here."""
    began = time.monotonic()
    (tmp_path / "run").mkdir()
    with (tmp_path / "log").open("wb") as log:
        argv = [sys.executable, "-I", "-S", "-c", BOMB]
        bounds = replace(sandbox.BOUNDS, tasks=500)
        process = sandbox.spawn(TIERS[tier], argv, tmp_path / "run", log, bounds=bounds)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(1.5)
        assert sandbox.end(process)
    assert time.monotonic() - began < 1.5 + sandbox.GONE_WITHIN_S and alive(str(tmp_path)) == []


def test_shared_memory_is_a_small_file_system_of_its_own(tmp_path: Path) -> None:
    if not BEST.namespaces:
        pytest.skip(f"this machine offers {BEST}")
    expression = "open('/dev/shm/part', 'wb').write(bytes(32 << 20))"
    how = replace(sandbox.BOUNDS, shm_share=memory(16 * MB))
    assert attempt(tmp_path / "on", expression, bounds=how) == "OSError"
    assert attempt(tmp_path / "off", expression) == str(32 * MB)
    assert not Path("/dev/shm/part").exists()


def test_a_crash_leaves_no_core(tmp_path: Path) -> None:
    pattern = Path("/proc/sys/kernel/core_pattern").read_text().strip()
    if not pattern.startswith("core"):
        pytest.skip(f"core dumps go to {pattern}")
    script = "import resource, os\nhard = resource.getrlimit(resource.RLIMIT_CORE)[1]\n"
    script += "resource.setrlimit(resource.RLIMIT_CORE, (hard, hard))\nos.abort()"
    assert run(tmp_path / "on", script)[0] == run(tmp_path / "off", script, without=["core"])[0] == 128 + 6
    assert not [*(tmp_path / "on").glob("core*")] and [*(tmp_path / "off").glob("core*")]


@pytest.mark.parametrize("tier", TIERS)
def test_a_run_goes_first_where_the_machine_runs_out_of_memory(tmp_path: Path, tier: str) -> None:
    expression = "open('/proc/self/oom_score_adj').read()"
    assert attempt(tmp_path / "on", expression, TIERS[tier]) == repr("1000\n")
    assert attempt(tmp_path / "off", expression, TIERS[tier], without=["oom"]) != repr("1000\n")
