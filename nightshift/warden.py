"""The first process of a sandbox, once its child has become the command: it reaps, counts what the run holds, ends it.

The run cannot get at it: in a pid namespace it is number 1, elsewhere Landlock keeps signals from it, where the kernel
can. Nothing but the standard library is imported here, and little of that: this is part of every start.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator, Sequence
from typing import Any

POLL_S, SELDOM_S = 0.25, 2.0  # between two looks at what a run holds, and where a look takes long
LOOKING_SHARE = 0.05  # of one core's time, so far as SELDOM_S allows; at the disk always
LIFELINE_SIGNAL = signal.SIGPWR  # where there is no pid namespace: the loop has died
PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
HEARD = (signal.SIGCHLD, LIFELINE_SIGNAL, *PASSED_ON)
OVERSTEPPED = {  # exit status → what a run was ended for; the command's own exit status is never one of these
    121: "its processes held more memory than a run may",
    122: "it had more processes and threads than a run may",
    123: "it wrote more to disk than a run may",
}
MEMORY, TASKS, DISK = OVERSTEPPED

Rules = dict[str, Any]


def below(pid: int) -> Iterator[int]:
    """Processes below `pid`, as /proc lists them; each is handed out before its own are looked for."""
    queue = [pid]
    while queue:
        parent = queue.pop()
        with contextlib.suppress(OSError):
            for task in os.listdir(f"/proc/{parent}/task"):
                with contextlib.suppress(OSError), open(f"/proc/{parent}/task/{task}/children") as file:
                    for child in map(int, file.read().split()):
                        yield child
                        queue.append(child)


def descendants(pid: int) -> list[int]:
    """Processes below `pid`, as /proc lists them now."""
    return list(below(pid))


def status_of(pid: int) -> dict[str, str]:
    """The lines of /proc/PID/status; none of a process that is gone."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/status") as file:
        return dict(line.rstrip("\n").split(":\t", 1) for line in file if ":\t" in line)
    return {}


def machine_memory() -> int:
    """Bytes that the machine has now: a virtual one may be given more as it is used."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _private_kb(pid: int) -> int:
    """Memory that a process does not merely map from files: its share of what it has in common with others."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/smaps_rollup") as file:
        return sum(int(line.split()[1]) for line in file if line.startswith(("Pss_Anon:", "Pss_Shmem:")))
    return 0


def _entries(folders: Sequence[str], most: int) -> Iterator[os.stat_result]:
    """What lies in the folders, however deep; stops beyond `most`."""
    queue, seen = list(folders), 0
    while queue:
        with contextlib.suppress(OSError), os.scandir(queue.pop()) as listing:
            for entry in listing:
                with contextlib.suppress(OSError):
                    yield entry.stat(follow_symlinks=False)
                    if entry.is_dir(follow_symlinks=False):
                        queue.append(entry.path)
                seen += 1
                if seen > most:
                    return


class Holdings:
    """What a run holds, against its bounds. The first look at the disk is what it starts from."""

    def __init__(self, rules: Rules) -> None:
        self.rules, self.without = rules, rules["without"]
        self.free = 0  # until it is known
        self.free = self._free()
        self.disk = min(rules["disk_bytes"], self.free // 2)  # bytes that it may write
        self.tasks = self._machine_tasks()
        self.before: tuple[int, int] | None = None
        self.overs = 0
        self.disk_at = 0.0

    def _free(self) -> int:
        try:
            found = os.statvfs(self.rules["folder"])
        except OSError:  # the run has taken its own folder away
            return self.free
        return found.f_bavail * found.f_frsize

    @staticmethod
    def _machine_tasks() -> int:
        with open("/proc/loadavg") as file:
            return int(file.read().split()[3].split("/")[1])

    def storm(self) -> bool:
        """Whether so many processes have come that a look at what the run holds cannot wait; this one costs nothing."""
        return self._machine_tasks() - self.tasks > self.rules["tasks"]

    def overstepped(self) -> tuple[int, str]:
        """Exit status and words, or 0."""
        pids = descendants(os.getpid())
        statuses = [status_of(pid) for pid in pids]
        found = self._tasks(statuses) or self._memory(pids, statuses)
        if not found and (began := time.monotonic()) >= self.disk_at:
            found = self._disk()
            self.disk_at = began + max(POLL_S, (time.monotonic() - began) / LOOKING_SHARE)
        return found or (0, "")

    def _tasks(self, statuses: list[dict[str, str]]) -> tuple[int, str] | None:
        count, most = sum(int(status.get("Threads", 0)) for status in statuses), self.rules["tasks"]
        if count > most and "tasks" not in self.without:
            return TASKS, f"{count} processes and threads, and a run may have {most}"
        return None

    def _memory(self, pids: list[int], statuses: list[dict[str, str]]) -> tuple[int, str] | None:
        """Twice in a row beyond the limit, so that a machine whose memory grows with its use has time to."""
        if "memory" in self.without:
            return None
        limit = self.rules["memory_share"] * min(machine_memory(), self.rules["memory_cap"] or 1 << 62)
        mapped = [int(s.get(name, "0").split()[0]) for s in statuses for name in ("RssAnon", "RssShmem")]
        held = 1024 * sum(mapped)
        if held > limit:  # forked workers share theirs: count that once, which takes longer
            held = 1024 * sum(_private_kb(pid) for pid in pids) or held
        self.overs = self.overs + 1 if held > limit else 0
        if self.overs >= 2:
            return MEMORY, f"{held / 2**30:.2f} GB of memory held, and a run may hold {limit / 2**30:.2f} GB"
        return None

    def _disk(self) -> tuple[int, str] | None:
        """A file that is open but has no name is seen by the disk's free space alone."""
        if "disk" in self.without:
            return None
        most = self.rules["files"] + (self.before[1] if self.before else 1 << 62)
        sizes = [entry.st_blocks * 512 for entry in _entries(self.rules["measured"], most)]
        if self.before is None:
            self.before = sum(sizes), len(sizes)
            return None
        written, limit = sum(sizes) - self.before[0], self.disk
        if written > limit:
            return DISK, f"{written / 2**30:.2f} GB written, and a run may write {limit / 2**30:.2f} GB"
        if len(sizes) > most:
            return DISK, f"more than {self.rules['files']} files made"
        if self._free() < self.rules["least_free"] * self.free:
            return DISK, f"{self._free() / 2**30:.2f} GB left on the disk, of {self.free / 2**30:.2f} GB at the start"
        return None


def sweep(command: int) -> None:
    """Ends all processes below this one. Each is stopped when it is found, so that it starts no other meanwhile.

    The command's own process group goes first, at one stroke: few storms bother to leave it.
    """
    with contextlib.suppress(OSError):
        os.killpg(command, signal.SIGKILL)
    found: set[int] = set()
    fresh = True
    while fresh:
        fresh = False
        for pid in below(os.getpid()):
            if pid not in found:
                fresh = True
                found.add(pid)
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGSTOP)
    for pid in found:
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGKILL)


def reap(command: int) -> tuple[int | None, bool]:
    """Takes leave of all that has ended: the command's exit status if it has, and whether any process is left."""
    code: int | None = None
    while True:
        try:
            pid, ended = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return code, False
        if pid == 0:
            return code, True
        if pid == command:
            code = os.waitstatus_to_exitcode(ended)


def take_precedence() -> None:
    """Ahead of all that the run starts, where that is allowed: a storm of processes leaves others no time.

    It is allowed to the machine's root, whom the kernel holds to no number of processes.
    """
    with contextlib.suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_RR | os.SCHED_RESET_ON_FORK, os.sched_param(1))


def watch(command: int, holdings: Holdings) -> int:
    """Until the command ends, oversteps, or the loop dies. Returns the exit status of the whole."""
    look_at = time.monotonic()
    while True:
        wait = min(POLL_S, max(0.0, look_at - time.monotonic()))
        told = signal.sigtimedwait(HEARD, wait)
        if told is not None and told.si_signo == LIFELINE_SIGNAL:
            return 128 + LIFELINE_SIGNAL
        if told is not None and told.si_signo in PASSED_ON:
            os.kill(command, told.si_signo)
        code, _ = reap(command)
        if code is not None:
            code = code if code >= 0 else 128 - code
            return code if code not in OVERSTEPPED else 1
        if (began := time.monotonic()) >= look_at or holdings.storm():
            code, words = holdings.overstepped()
            if code:
                print(f"nightshift: stopped: {words}", flush=True)
                return code
            took = time.monotonic() - began
            look_at = began + min(SELDOM_S, max(POLL_S, took / LOOKING_SHARE))


def end_rest(command: int) -> None:
    """Until none is left below this process; for where no pid namespace goes with it."""
    while reap(command)[1]:
        sweep(command)
        signal.sigtimedwait([signal.SIGCHLD], POLL_S)
