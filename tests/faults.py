"""Faults for nights of dice: a process that is killed just before its n-th effect on the disk, a disk that fills up."""

from __future__ import annotations

import errno
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

# What Python tells of itself before it changes a disk or has git change it (sys.addaudithook).
EFFECTS = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.chmod", "subprocess.Popen", "open"}
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def changes_disk(event: str, args: tuple[Any, ...]) -> bool:
    """Whether an audit event announces an effect that outlives the process."""
    if event == "open":
        return isinstance(args[2], int) and bool(args[2] & WRITES)
    return event in EFFECTS


def in_a_process(work: Callable[[], object], before: Callable[[int, str, tuple[Any, ...]], None]) -> tuple[int, int]:
    """Does `work` in a forked process that calls `before` with each effect's number, from 1; exit status, and effects.

    The status is as waitpid gives it; an exception is printed and is 1.
    """
    told, tell = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(told)
        _work(work, before, tell)
    os.close(tell)
    with os.fdopen(told, "rb") as file:
        counted = file.read()
    _, status = os.waitpid(child, 0)
    return status, len(counted)


def _work(work: Callable[[], object], before: Callable[[int, str, tuple[Any, ...]], None], tell: int) -> None:
    made, inside = 0, False

    def hook(event: str, args: tuple[Any, ...]) -> None:
        nonlocal made, inside
        if inside or not changes_disk(event, args):
            return
        made, inside = made + 1, True
        os.write(tell, b".")
        try:
            before(made, event, args)
        finally:
            inside = False

    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    sys.addaudithook(hook)
    try:
        work()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def kill_at(number: int) -> Callable[[int, str, tuple[Any, ...]], None]:
    """SIGKILL just before the effect of that number; 0 for never."""

    def before(made: int, event: str, args: tuple[Any, ...]) -> None:
        if made == number:
            os.kill(os.getpid(), signal.SIGKILL)

    return before


def full_at(number: int, below: Path) -> Callable[[int, str, tuple[Any, ...]], None]:
    """A disk that is full from the effect of that number on, for files below a folder."""

    def before(made: int, event: str, args: tuple[Any, ...]) -> None:
        if made >= number and event in ("open", "os.truncate", "os.mkdir") and str(args[0]).startswith(str(below)):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(args[0]))

    return before
