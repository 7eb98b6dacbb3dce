"""Small scripts in a sandbox of their own, with one defence or another switched off."""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path
from typing import Any

from nightshift import sandbox
from nightshift.sandbox import Tier

BEST = sandbox.probe()
LANDLOCK = Tier(False, BEST.landlock)
NOTHING = Tier(False, 0)
TIERS = {"best": BEST, "no namespaces": LANDLOCK, "nothing": NOTHING}

TRIES = """
import ctypes, os, resource, socket, subprocess, sys, time
libc = ctypes.CDLL(None, use_errno=True)
def call(result):
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result
def connect(where, family=socket.AF_UNIX):
    with socket.socket(family) as sock:
        sock.settimeout(2)
        return sock.connect(where)
try:
    print(repr({expression}))
except (OSError, subprocess.CalledProcessError) as error:
    print(type(error).__name__)
"""


def run(folder: Path, script: str, tier: Tier = BEST, **how: Any) -> tuple[int, str]:
    """A Python script to its end in a sandbox: exit status, and what it printed."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder.parent / f"{folder.name}.log"
    with path.open("wb") as log:
        argv = [sys.executable, "-I", "-S", "-c", textwrap.dedent(script)]
        process = sandbox.spawn(tier, argv, folder, log, **how)
        try:
            process.wait(30)
        finally:
            assert sandbox.end(process)
    return process.returncode, path.read_text()


def attempt(folder: Path, expression: str, tier: Tier = BEST, **how: Any) -> str:
    """What a sandboxed Python makes of an expression: its value as text, or the name of the error."""
    return run(folder, TRIES.format(expression=expression), tier, **how)[1].strip()
