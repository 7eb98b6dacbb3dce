"""Where untrusted processes run: namespaces of their own, a Landlock allow-list, few environment variables, a sure end.

    setpriv --pdeathsig KILL unshare -Urpn --fork --kill-child --mount-proc python sandbox.py '{...}' -- command

`setpriv` ends the whole chain when the loop dies, even of SIGKILL; `unshare` gives user, pid, network and mount
namespaces; this file, run as a script inside them, brings loopback up (torchrun and NCCL need it), restricts the file
system to an allow-list, and becomes the command. Data, journal, `.git` and everything else that is not on the list
cannot be opened. Where namespaces or Landlock are not to be had, `probe` says so and the night goes on with what is.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

NAMESPACES = ["unshare", "-Urpn", "--fork", "--kill-child", "--mount-proc"]
LIFELINE = ["setpriv", "--pdeathsig", "KILL"]
SYSTEM = ["/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/etc", "/opt", "/proc", "/sys"]
DEVICES = ["null", "zero", "full", "random", "urandom", "tty", "ptmx", "pts", "shm", "nvidia*"]  # of /dev
PROC = Path("/proc")  # where it cannot be written, CUDA does not start (driver 580); inside, it is a /proc of their own
ROOT = Path(__file__).resolve().parent.parent
FACE = ["prepare.py", "nightshift", "config.yaml"]  # what a run may import, and the file that goes with it
PASSED_PREFIXES = ("NCCL_", "TORCH", "NVSHMEM_", "CUDA_", "NVIDIA_", "TRITON_", "LC_", "OMP_", "MKL_", "PYTORCH_")
SECRET = re.compile("KEY|TOKEN|SECRET|PASS|CREDENTIAL", re.IGNORECASE)  # NVIDIA_API_KEY has a passed prefix
PASSED_NAMES = ("PATH", "LANG", "LD_LIBRARY_PATH", "CC", "CXX", "TZ")
GONE_WITHIN_S = 5.0


@dataclass(frozen=True)
class Tier:
    """What this machine offers: `missing` is what a person is told."""

    namespaces: bool
    landlock: int  # ABI version, 0 for none
    missing: str = ""

    def __str__(self) -> str:
        parts = ["namespaces"] * self.namespaces + [f"Landlock ABI {self.landlock}"] * bool(self.landlock)
        return " + ".join(parts) or "unsandboxed"


def probe() -> Tier:
    """Tries what a run will need, for real."""
    command = [*LIFELINE, *NAMESPACES, "true"]
    try:
        tried = subprocess.run(command, capture_output=True, text=True, timeout=10)
        failure = tried.stderr.strip().splitlines()[-1] if tried.returncode and tried.stderr.strip() else ""
        namespaces = tried.returncode == 0
    except (OSError, subprocess.TimeoutExpired) as error:
        namespaces, failure = False, str(error)
    abi = max(0, _libc().syscall(_CREATE_RULESET, None, 0, 1))
    missing = [] if namespaces else [f"no namespaces ({failure or 'unshare failed'})"]
    missing += [] if abi else ["no Landlock in this kernel"]
    return Tier(namespaces, abi, "; ".join(missing))


def readable(face: Path) -> list[Path]:
    """What a sandboxed Python needs to read: the system, the interpreter, its packages, and nightshift's own code."""
    packages = [Path(p).resolve() for p in sys.path if p and Path(p).is_dir()]
    python = [Path(p).resolve() for p in (sys.prefix, sys.base_prefix, sys.exec_prefix)]
    foreign = [p for p in packages if p != ROOT and ROOT not in p.parents]
    return [*map(Path, SYSTEM), *python, *foreign, face, *(ROOT / name for name in FACE)]


def make_face(folder: Path) -> Path:
    """A folder with links to what a run may import, for PYTHONPATH: to list the checkout itself is not allowed."""
    face = folder / "face"
    face.mkdir(parents=True, exist_ok=True)
    for name in FACE:
        link = face / name
        if not link.is_symlink():
            link.symlink_to(ROOT / name)
    return face


def environment(folder: Path, face: Path, extra: Mapping[str, str]) -> dict[str, str]:
    """The variables of a sandboxed process: few, and no key or token among them. HOME and TMPDIR are the run's own."""
    passed = [name for name in os.environ if name in PASSED_NAMES or name.startswith(PASSED_PREFIXES)]
    kept = {name: os.environ[name] for name in passed if not SECRET.search(name)}
    home = folder / "home"
    home.mkdir(parents=True, exist_ok=True)
    paths = [str(face), *(p for p in os.environ.get("PYTHONPATH", "").split(":") if p)]
    ours = {"HOME": str(home), "TMPDIR": str(home), "PYTHONPATH": ":".join(paths), "PYTHONDONTWRITEBYTECODE": "1"}
    ours |= {"PYTHONUNBUFFERED": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    return kept | ours | dict(extra)


def cache_environment(cache: Path) -> dict[str, str]:
    """Where compilers keep what they compiled, from one run to the next."""
    cache.mkdir(parents=True, exist_ok=True)
    names = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
    compilers = {name: str(cache / name.partition("_")[0].lower()) for name in names}
    return compilers | bytecode_environment(cache.parent / "bytecode")


def bytecode_environment(folder: Path) -> dict[str, str]:
    """Where torch was installed without bytecode, and compiling its source costs every start seconds: a place for it.

    Only trusted processes write there; a run reads it.
    """
    import importlib.util

    torch = importlib.util.find_spec("torch")
    if torch is None or torch.origin is None or Path(importlib.util.cache_from_source(torch.origin)).exists():
        return {}
    folder.mkdir(parents=True, exist_ok=True)
    return {"PYTHONPYCACHEPREFIX": str(folder)}


def spawn(
    tier: Tier,
    argv: Sequence[str],
    folder: Path,
    log: IO[bytes],
    *,
    env: Mapping[str, str] = {},
    writable: Sequence[Path] = (),
    pass_fds: Sequence[int] = (),
) -> subprocess.Popen[bytes]:
    """Starts argv in `folder`, which it may write, and with it `writable` and a few devices; the rest it may not.

    To be called from the main thread: the lifeline is cut when the thread that spawned ends.
    """
    face = make_face(folder)
    rules = {
        "read": [str(p) for p in [*readable(face), Path(env.get("PYTHONPYCACHEPREFIX", face))] if p.exists()],
        "write": [str(p) for p in [folder, *writable, PROC, *_devices()] if p.exists()],
        "landlock": tier.landlock,
        "namespaces": tier.namespaces,
    }
    shim = [sys.executable, "-I", "-S", __file__, json.dumps(rules), "--", *argv]
    chain = [*LIFELINE, *(NAMESPACES if tier.namespaces else []), *shim]
    return subprocess.Popen(
        chain,
        cwd=folder,
        env=environment(folder, face, env),
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        pass_fds=pass_fds,
        start_new_session=True,
    )


def _devices() -> list[Path]:
    """What of /dev a run may open; a disk is not among it."""
    return [path for name in DEVICES for path in sorted(Path("/dev").glob(name))]


def descendants(pid: int) -> list[int]:
    """Processes below `pid`, as /proc lists them now."""
    found, queue = [], [pid]
    while queue:
        parent = queue.pop()
        for children in Path(f"/proc/{parent}/task").glob("*/children"):
            with contextlib.suppress(OSError):
                queue += (below := [int(c) for c in children.read_text().split()])
                found += below
    return found


def end(process: subprocess.Popen[bytes]) -> bool:
    """Kills what is below the process, then it, and waits until all are gone. False where some outlived GONE_WITHIN_S.

    The first process of a pid namespace takes the rest of it along; where there is none, `_guard` sees to that.
    """
    watched = []
    for pid in descendants(process.pid):
        with contextlib.suppress(ProcessLookupError):
            watched.append(os.pidfd_open(pid))
    for fd in watched:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(fd, signal.SIGKILL)
    deadline = time.monotonic() + GONE_WITHIN_S
    gone = True
    for fd in watched:
        ended = select.poll()
        ended.register(fd, select.POLLIN)
        gone = bool(ended.poll(1000 * max(0.0, deadline - time.monotonic()))) and gone
        os.close(fd)
    if watched:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, deadline - time.monotonic()))
    process.kill()
    process.wait()
    return gone


# Inside: what follows runs as a script in the new process, and imports nothing but the standard library.

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446  # landlock(7); the same numbers on every architecture
_READ = 1 << 0 | 1 << 2 | 1 << 3  # execute, read a file, list a directory
_WRITE = 1 << 1 | 0b1111_1111_0000  # write a file; remove and make what a directory holds
_MAKE_SYM, _REFER, _TRUNCATE = 1 << 12, 1 << 13, 1 << 14
_ON_FILES = 1 << 0 | 1 << 1 | 1 << 2 | _TRUNCATE
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER, _PR_SET_NO_NEW_PRIVS = 1, 36, 38
_MS_RDONLY, _MS_REMOUNT, _MS_BIND = 1, 32, 4096
MACHINE_WIDE = ["sys", "sysrq-trigger", "irq", "bus", "fs"]
_SIOCGIFFLAGS, _SIOCSIFFLAGS, _IFF_UP = 0x8913, 0x8914, 1


class _PathBeneath(ctypes.Structure):
    _pack_ = 1
    _fields_ = [("allowed", ctypes.c_uint64), ("fd", ctypes.c_int32)]


def _libc() -> Any:
    return ctypes.CDLL(None, use_errno=True)


def _loopback_up() -> None:
    import fcntl
    import socket
    import struct

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        request = struct.pack("16sh14x", b"lo", 0)
        _, flags = struct.unpack("16sh14x", fcntl.ioctl(sock, _SIOCGIFFLAGS, request))
        fcntl.ioctl(sock, _SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", flags | _IFF_UP))


def _proc_read_only() -> None:
    """Shuts the parts of /proc that steer the whole machine: they trust the root that a loop run by root maps to."""
    for name in MACHINE_WIDE:
        path = f"/proc/{name}".encode()
        if os.path.exists(path):
            for flags in (_MS_BIND, _MS_BIND | _MS_REMOUNT | _MS_RDONLY):
                if _libc().mount(path, path, None, flags, None):
                    raise OSError(ctypes.get_errno(), "mount", path.decode())


def _landlock(abi: int, read: Sequence[str], write: Sequence[str]) -> None:
    """Allows `read` to be read and executed, `write` to be changed too, and nothing else (landlock(7))."""
    libc = _libc()
    writing = _READ | _WRITE | _MAKE_SYM | (_REFER if abi >= 2 else 0) | (_TRUNCATE if abi >= 3 else 0)
    handled = ctypes.c_uint64(writing)
    ruleset = libc.syscall(_CREATE_RULESET, ctypes.byref(handled), ctypes.c_size_t(8), 0)
    if ruleset < 0:
        raise OSError(ctypes.get_errno(), "landlock_create_ruleset")
    for path, access in [*((p, _READ) for p in read), *((p, writing) for p in write)]:
        fd = os.open(path, os.O_PATH)
        rule = _PathBeneath(access if os.path.isdir(path) else access & _ON_FILES & writing, fd)
        if libc.syscall(_ADD_RULE, ruleset, 1, ctypes.byref(rule), 0):
            raise OSError(ctypes.get_errno(), "landlock_add_rule", path)
        os.close(fd)
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) or libc.syscall(_RESTRICT_SELF, ruleset, 0):
        raise OSError(ctypes.get_errno(), "landlock_restrict_self")
    os.close(ruleset)


def _guard() -> None:
    """In place of a pid namespace: stays behind as the parent of all that the command leaves, and ends that with it.

    Returns in a child, which becomes the command. The lifeline now says SIGTERM, so that the guard ends the others
    before itself. It is no match for a command that kills it.
    """
    libc = _libc()
    libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    command = os.fork()
    if command == 0:
        libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
        return

    def kill_all(*_: object) -> None:
        for pid in descendants(os.getpid()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    signal.signal(signal.SIGTERM, kill_all)
    libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)
    status: int | None = None
    with contextlib.suppress(ChildProcessError):  # until there is none left
        while True:
            pid, ended = os.waitpid(-1, 0)
            status = ended if pid == command else status
            if status is not None:
                kill_all()
    code = os.waitstatus_to_exitcode(status or 0)
    os._exit(code if code >= 0 else 128 - code)


def _enter() -> None:
    rules, command = json.loads(sys.argv[1]), sys.argv[3:]
    if rules["namespaces"]:
        _loopback_up()
        _proc_read_only()
    else:
        _guard()
    if rules["landlock"]:
        _landlock(rules["landlock"], rules["read"], rules["write"])
    os.execvp(command[0], command)


if __name__ == "__main__":
    _enter()
