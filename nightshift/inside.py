"""Inside the sandbox, before the command runs: shuts off what it must not reach, and forks.

    python -I -S -c 'from nightshift.inside import main; main()' RULES -- command

RULES is JSON, as `sandbox.rules` makes it; `without` in it names defences that a test has switched off. The child gives
up every power and becomes the command; the parent stays behind as its warden. Nothing but the standard library is
imported here, and little of that: this is part of every start.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import resource
import signal
import sys
from typing import Any

from nightshift import warden
from nightshift.warden import Rules, machine_memory

_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_CAPBSET_DROP = 1, 4, 24
_PR_SET_CHILD_SUBREAPER, _PR_SET_NO_NEW_PRIVS = 36, 38
_CAPABILITIES_V3 = 0x20080522
FILE_POWERS = 0b11111  # chown, dac_override, dac_read_search, fowner, fsetid: where uid 0 is the machine's own
_MOUNT_SETATTR = 442  # this and the next three have the same number on every architecture
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446  # landlock(7)
_MS_NOSUID, _MS_NODEV, _MS_BIND, _MS_REC, _MS_UNBINDABLE, _MS_SLAVE = 2, 4, 4096, 16384, 1 << 17, 1 << 19
_ATTR_RDONLY, _ATTR_NOSUID, _ATTR_NODEV = 1, 2, 4
_AT_FDCWD, _AT_RECURSIVE, _MNT_DETACH = -100, 0x8000, 2
MACHINE_WIDE = ["sys", "sysrq-trigger", "irq", "bus", "fs"]
_READ = 1 << 0 | 1 << 2 | 1 << 3  # execute, read a file, list a directory
_WRITE = 1 << 1 | 0b1111_1111_0000  # write a file; remove and make what a directory holds
_MAKE_SYM, _REFER, _TRUNCATE = 1 << 12, 1 << 13, 1 << 14
_ON_FILES = 1 << 0 | 1 << 1 | 1 << 2 | _TRUNCATE
_TCP, _SCOPES = 3, 3  # bind and connect; abstract sockets and signals
_SIOCGIFFLAGS, _SIOCSIFFLAGS, _IFF_UP = 0x8913, 0x8914, 1


class _PathBeneath(ctypes.Structure):
    _pack_ = 1
    _fields_ = [("allowed", ctypes.c_uint64), ("fd", ctypes.c_int32)]


def libc() -> Any:
    """The C library, for calls that Python has no function for."""
    return ctypes.CDLL(None, use_errno=True)


def landlock_abi() -> int:
    """The version that this kernel offers; 0 for none."""
    return max(0, int(libc().syscall(_CREATE_RULESET, None, 0, 1)))


def become_subreaper() -> None:
    """From now on what loses its parent, below this process, becomes its child."""
    libc().prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def _check(result: int, what: str, path: str = "") -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}", path or None)
    return result


# The view: a root of its own, in which nothing is but what is on the list


def _mount(source: str, target: str, kind: str | None, flags: int, data: str = "") -> None:
    words = source.encode(), target.encode(), kind and kind.encode()
    _check(libc().mount(*words, ctypes.c_ulong(flags), data.encode()), "mount", target)


def _restrict(path: str, attributes: int, flags: int = 0) -> None:
    """mount_setattr(2): adds to a mount's attributes, also where an inherited one may not be taken away."""
    wanted = (ctypes.c_uint64 * 4)(attributes)
    result = libc().syscall(_MOUNT_SETATTR, _AT_FDCWD, path.encode(), flags, wanted, ctypes.c_size_t(32))
    _check(result, "mount_setattr", path)


def _lead_to(root: str, path: str) -> str:
    """Lays the way to `path` in the new root: symbolic links on it are links there too. Returns where it ends."""
    done, ahead, links = "", path.split("/")[1:], 0
    while ahead:
        name = ahead.pop(0)
        here = os.path.dirname(done) if name == ".." else f"{done}/{name}" if name not in ("", ".") else done
        if not os.path.islink(here) or (links := links + 1) > 40:
            done = here
            continue
        aim = os.readlink(here)
        if not os.path.lexists(root + here):
            os.makedirs(root + done, exist_ok=True)
            os.symlink(aim, root + here)
        done, ahead = "" if aim.startswith("/") else done, [*aim.split("/"), *ahead]
    return done


def _lay(root: str, path: str, how: str) -> None:
    """Puts one path of the list into the new root: to be read, to be written, a device; or hides it."""
    place, private = root + path, _ATTR_NOSUID | _ATTR_NODEV
    if how == "hidden":
        if os.path.isdir(place):
            _mount("none", place, "tmpfs", _MS_NOSUID | _MS_NODEV, "mode=755,size=1m")
        return
    if os.path.isdir(path):
        os.makedirs(place, exist_ok=True)
    elif not os.path.lexists(place):
        os.makedirs(os.path.dirname(place), exist_ok=True)
        os.close(os.open(place, os.O_CREAT | os.O_WRONLY, 0o644))
    _mount(path, place, None, _MS_BIND | _MS_REC)
    attributes = {"read": private | _ATTR_RDONLY, "system": private | _ATTR_RDONLY, "write": private}
    _restrict(place, attributes.get(how, _ATTR_NOSUID), _AT_RECURSIVE)


def _view(rules: Rules) -> None:
    """A new root on a tmpfs, made in the run's HOME, which it does not cover afterwards; the old one is let go.

    What is not on the list has no name in here: it cannot be opened, listed, changed or connected to.
    """
    root = rules["home"]
    _mount("none", root, "tmpfs", _MS_NOSUID | _MS_NODEV, "mode=755,size=1m")
    _mount("none", root, None, _MS_UNBINDABLE)  # the run's own folder holds it, and is bound into it
    for path, how in rules["tree"]:  # parents first: what lies deeper overrides
        _lay(root, path, how)
    for path in rules["links"]:
        _lead_to(root, path)
    os.makedirs(f"{root}/proc")
    _mount("/proc", f"{root}/proc", None, _MS_BIND | _MS_REC)
    os.makedirs(f"{root}/dev/shm")
    size = int(rules["shm_share"] * machine_memory())
    _mount("none", f"{root}/dev/shm", "tmpfs", _MS_NOSUID | _MS_NODEV, f"mode=1777,size={size}")
    for name, aim in (("fd", "fd"), ("stdin", "fd/0"), ("stdout", "fd/1"), ("stderr", "fd/2")):
        os.symlink(f"/proc/self/{aim}", f"{root}/dev/{name}")
    os.chdir(root)
    _check(libc().pivot_root(b".", b"."), "pivot_root", root)  # pivot_root(2): the old root now lies on the new
    _mount("none", ".", None, _MS_SLAVE | _MS_REC)
    _check(libc().umount2(b".", _MNT_DETACH), "umount", root)
    os.chdir("/")
    for path in ["/", *(path for path, how in rules["tree"] if how == "hidden" and os.path.isdir(path))]:
        _restrict(path, _ATTR_RDONLY)


def _proc_read_only() -> None:
    """Shuts the parts of /proc that steer the whole machine: they trust the root that a loop run by root maps to."""
    for name in MACHINE_WIDE:
        path = f"/proc/{name}"
        if os.path.exists(path):
            _mount(path, path, None, _MS_BIND)
            _restrict(path, _ATTR_RDONLY)


def _settle(rules: Rules) -> None:
    """Settings that are this namespace's own: no more namespaces within, and a last process number.

    kernel.pid_max belongs to a pid namespace since Linux 6.14; before that it is the machine's, and left alone.
    """
    if "powers" not in rules["without"]:
        with contextlib.suppress(OSError), open("/proc/sys/user/max_user_namespaces", "w") as file:
            file.write("0")
    release = tuple(int(part) for part in os.uname().release.split("-")[0].split(".")[:2])
    if release >= (6, 14) and "tasks" not in rules["without"]:
        with contextlib.suppress(OSError), open("/proc/sys/kernel/pid_max", "w") as file:
            file.write(str(max(400, rules["tasks"])))  # the kernel takes no less than 301


def _loopback_up() -> None:
    """torchrun and NCCL need it."""
    import fcntl
    import socket
    import struct

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        request = struct.pack("16sh14x", b"lo", 0)
        _, flags = struct.unpack("16sh14x", fcntl.ioctl(sock, _SIOCGIFFLAGS, request))
        fcntl.ioctl(sock, _SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", flags | _IFF_UP))


# The child: what it gives up before it becomes the command


def _powerless(kept: int) -> None:
    """No capability but those in the mask `kept`, and no way to any: not by a setuid program, not by being root."""
    for capability in range(64):
        refused = not kept >> capability & 1 and libc().prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0)
        if refused and ctypes.get_errno() == errno.EINVAL:  # beyond the last that this kernel has
            break
    header, held = (ctypes.c_uint32 * 2)(_CAPABILITIES_V3, 0), (ctypes.c_uint32 * 6)()
    _check(libc().capget(header, held), "capget")
    for index in range(6):
        held[index] &= (kept if index < 2 else 0) if index % 3 != 2 else 0  # effective and permitted; inheritable: none
    _check(libc().capset(header, held), "capset")


def _landlock(rules: Rules) -> None:
    """Allows `read` to be read and executed, `write` to be changed too, and nothing else (landlock(7)).

    Where the kernel can: no signal to, and no abstract socket of, a process outside; and no TCP, unless ranks need it.
    """
    abi = rules["landlock"]
    writing = _READ | _WRITE | _MAKE_SYM | (_REFER if abi >= 2 else 0) | (_TRUNCATE if abi >= 3 else 0)
    tcp = _TCP if abi >= 4 and not rules["tcp"] and "tcp" not in rules["without"] else 0
    scopes = _SCOPES if abi >= 6 and "scopes" not in rules["without"] else 0
    handled = (ctypes.c_uint64 * 3)(writing, tcp, scopes)
    size = ctypes.c_size_t(24 if abi >= 6 else 16 if abi >= 4 else 8)
    ruleset = _check(libc().syscall(_CREATE_RULESET, handled, size, 0), "landlock_create_ruleset")
    for path, access in [*((p, _READ) for p in rules["read"]), *((p, writing) for p in rules["write"])]:
        with contextlib.suppress(FileNotFoundError):
            fd = os.open(path, os.O_PATH)
            rule = _PathBeneath(access if os.path.isdir(path) else access & _ON_FILES & writing, fd)
            _check(libc().syscall(_ADD_RULE, ruleset, 1, ctypes.byref(rule), 0), "landlock_add_rule", path)
            os.close(fd)
    _check(libc().syscall(_RESTRICT_SELF, ruleset, 0), "landlock_restrict_self")
    os.close(ruleset)


def _limits(rules: Rules, largest_file: int) -> None:
    """Resource limits. A core limit of 1 also keeps a dump from being piped to a program, which 0 does not (core(5)).

    The kernel does not hold the machine's root to RLIMIT_NPROC; its runs are held by pid_max and by the warden.
    """
    wanted = {"core": (resource.RLIMIT_CORE, 1), "disk": (resource.RLIMIT_FSIZE, largest_file)}
    tasks = rules["tasks"] + (0 if rules["namespaces"] else _tasks_of(os.getuid()))
    wanted["tasks"] = (resource.RLIMIT_NPROC, tasks)
    for name, (which, value) in wanted.items():
        _, most = resource.getrlimit(which)
        value = value if most == resource.RLIM_INFINITY else min(value, most)
        if name not in rules["without"]:
            resource.setrlimit(which, (value, value))
    if "oom" not in rules["without"]:
        with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
            file.write("1000")  # where the machine runs out of memory all the same, a run goes first


def _tasks_of(uid: int) -> int:
    """Processes and threads that a user has, as RLIMIT_NPROC counts them."""
    total = 0
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            if os.stat(f"/proc/{pid}").st_uid == uid:
                total += len(os.listdir(f"/proc/{pid}/task"))
    return total


def _become(rules: Rules, command: list[str], largest_file: int) -> None:
    """The child's way: does not return."""
    without = rules["without"]
    if not rules["namespaces"]:
        libc().prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if "warden" not in without:
        os.setsid()  # a process group that does not hold the warden, and cannot be left for one that does
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    os.chdir(rules["folder"])
    _limits(rules, largest_file)
    if "powers" not in without:
        _powerless(0 if rules["namespaces"] else FILE_POWERS)
    _check(libc().prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")
    if rules["landlock"] and "landlock" not in without:
        _landlock(rules)
    os.execvp(command[0], command)


def main() -> None:
    """Shuts off, forks, watches. In a pid namespace its own end takes the rest along; elsewhere it sweeps."""
    rules, command = json.loads(sys.argv[1]), sys.argv[3:]
    signal.pthread_sigmask(signal.SIG_BLOCK, warden.HEARD)
    if rules["namespaces"]:
        _loopback_up()
        _settle(rules)
        if "view" not in rules["without"]:
            _view(rules)
        if "proc" not in rules["without"]:
            _proc_read_only()
    elif "warden" not in rules["without"]:
        become_subreaper()
        libc().prctl(_PR_SET_PDEATHSIG, int(warden.LIFELINE_SIGNAL), 0, 0, 0)
    holdings = warden.Holdings(rules)
    child = 0 if "warden" in rules["without"] else os.fork()
    if child == 0:
        _become(rules, command, holdings.disk)
    if "secrecy" not in rules["without"]:
        libc().prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)  # for the run not to look into, or trace, this process
    for fd in map(int, os.listdir("/proc/self/fd")):
        if fd > 2:  # what was handed to the command ends with the command
            with contextlib.suppress(OSError):
                os.close(fd)
    if "tasks" not in rules["without"]:
        warden.take_precedence()
    code = warden.watch(child, holdings)
    if not rules["namespaces"]:
        warden.end_rest(child)
    os._exit(code)
