"""Where untrusted processes run: a root and namespaces of their own, few environment variables, bounds, a sure end.

    setpriv --pdeathsig KILL unshare -Urpn --fork --kill-child --mount-proc python (nightshift.inside) RULES -- command

`setpriv` ends the whole chain when the loop dies, even of SIGKILL; `unshare` gives user, pid, network and mount
namespaces; `nightshift.inside`, in them, makes a new root that holds the allow-list and nothing else, restricts the
command to the same list once more (Landlock), and `nightshift.warden` watches over what it holds. Three tiers, the best
that a trial run finds to work:

    namespaces    what is not on the list is not there: no name to open, to list, to change or to connect to
    Landlock      it cannot be opened; it can be seen, and a pathname socket connected to
    none          only the variables, the bounds and the end are sure
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from nightshift.inside import become_subreaper, landlock_abi
from nightshift.warden import LIFELINE_SIGNAL, status_of
from nightshift.warden import OVERSTEPPED as OVERSTEPPED
from nightshift.warden import descendants as descendants

NAMESPACES = ["unshare", "-Urpn", "--fork", "--kill-child", "--mount-proc"]
LIFELINE = ["setpriv", "--pdeathsig", "KILL"]
SYSTEM = ["/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/opt", "/sys"]
ETC = ["alternatives", "crypto-policies", "group", "hosts", "ld.so.cache", "ld.so.conf", "ld.so.conf.d", "libibverbs.d"]
ETC += ["localtime", "nccl.conf", "nsswitch.conf", "nvidia", "OpenCL", "os-release", "passwd", "protocols", "services"]
ETC += ["ssl/openssl.cnf", "timezone"]  # of /etc: no shadow, no keys of the machine's
DEVICES = ["null", "zero", "full", "random", "urandom"]  # of /dev; no terminal: those are the person's
GPU_NODES = re.compile(r"nvidia(\d+)")
ROOT = Path(__file__).resolve().parent.parent
FACE = ["prepare.py", "nightshift", "config.yaml"]  # what a run may import, and the file that goes with it
PASSED_PREFIXES = ("NCCL_", "TORCH", "NVSHMEM_", "CUDA_", "NVIDIA_", "TRITON_", "LC_", "OMP_", "MKL_", "PYTORCH_")
SECRET = re.compile("KEY|TOKEN|SECRET|PASS|CREDENTIAL", re.IGNORECASE)  # NVIDIA_API_KEY has a passed prefix
PASSED_NAMES = ("PATH", "LANG", "LD_LIBRARY_PATH", "CC", "CXX", "TZ")
GONE_WITHIN_S = 5.0
WATCHED = 64  # processes at most whose end is waited for one by one: what holds the others is among them
TRIAL_S = 20.0
ENTER = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from nightshift.inside import main; main()"
TRIAL = """import sys
try:
    open(sys.argv[1])
except OSError:
    sys.exit(0)
sys.exit("a file that it must not read is open to it")"""
EXPOSED = "UNSANDBOXED: every run can read what you can, held-out data, keys and all, and reach the network"


@dataclass(frozen=True)
class Tier:
    """What this machine offers: `missing` is what a person is told."""

    namespaces: bool
    landlock: int  # ABI version, 0 for none
    missing: str = ""

    def __str__(self) -> str:
        parts = ["namespaces"] * self.namespaces + [f"Landlock ABI {self.landlock}"] * bool(self.landlock)
        return " + ".join(parts) or "unsandboxed"


@dataclass(frozen=True)
class Bounds:
    """What a run may hold: each process tree of its own, the training and the model server."""

    memory_share: float = 0.75  # of the machine's memory: what is not mapped from files, summed over its processes
    shm_share: float = 0.2  # of the machine's memory: the size of its /dev/shm
    disk_bytes: int = 64 << 30  # written while it runs, and in one file; never more than half of what is free.
    # It is what the slowest disk that a save window allows for takes in startup_s: 600 s at 100 MB/s.
    least_free: float = 0.25  # of the disk space that was free at the start: below it a run ends, whoever writes
    files: int = 200_000  # made while it runs
    tasks: int = 8192  # processes and threads for each rank: 32 compile workers of 128 threads, and as much again


BOUNDS = Bounds()


def probe() -> Tier:
    """The best that works, found by runs that look for a file that they must not find. It takes a tenth of a second."""
    abi = landlock_abi()
    no_landlock = _trial(Tier(True, abi)) if abi else "no Landlock in this kernel"
    if not no_landlock:
        return Tier(True, abi)
    no_namespaces = _trial(Tier(True, 0))
    if not no_namespaces:
        return Tier(True, 0, no_landlock)
    no_landlock = _trial(Tier(False, abi)) if abi else no_landlock
    missing = f"no namespaces ({no_namespaces})"
    if not no_landlock:
        return Tier(False, abi, missing)
    return Tier(False, 0, f"{EXPOSED}; {missing}; {no_landlock}; `python loop.py doctor` says what would mend it")


def _trial(tier: Tier) -> str:
    """What is wrong with a run in this tier; "" where it runs and is shut off."""
    with tempfile.TemporaryDirectory(prefix="nightshift-") as name, tempfile.TemporaryFile() as log:
        (secret := Path(name, "secret")).write_text("not for runs")
        try:
            process = spawn(tier, [sys.executable, "-I", "-S", "-c", TRIAL, str(secret)], Path(name, "run"), log)
        except OSError as error:
            return str(error)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(TRIAL_S)
        end(process)
        log.seek(0)
        said = log.read().decode(errors="replace").strip().splitlines() or [f"exit status {process.returncode}"]
        return said[-1] if process.returncode else ""


# What a run may read and write


def readable() -> list[Path]:
    """What a sandboxed Python needs to read: the system, the interpreter, its packages, and nightshift's own code."""
    private = [ROOT, *hidden()]
    prefixes = {Path(p).absolute() for p in (sys.prefix, sys.base_prefix, sys.exec_prefix)}
    parts = ("bin", "include", "lib", "lib64", "pyvenv.cfg")  # of an environment made in a folder that is private
    python = [path for p in prefixes for path in ([p / part for part in parts] if p.resolve() in private else [p])]
    libraries = [*os.environ.get("LD_LIBRARY_PATH", "").split(":"), os.environ.get("CUDA_HOME", "")]
    named = [Path(p).absolute() for p in [*sys.path, *libraries] if p and Path(p).is_dir()]
    named = [p for p in named if ROOT not in p.parents and not any(x.is_relative_to(p) for x in private)]
    system = [*map(Path, SYSTEM), *(Path("/etc", name) for name in ETC)]
    found = [*system, *python, *named, *(ROOT / name for name in FACE)]
    return [path for path in dict.fromkeys(found) if path.exists()]


def hidden() -> list[Path]:
    """What no run may see, also where it lies in a folder that runs may read: the deeper of two rules holds.

    The checkout with `.git`, journal and other experiments, prepared data, the texts it was made from, and the HOME.
    """
    from nightshift import data  # which needs numpy: not before a run is made

    places = [ROOT, data.home()]
    places += [Path(os.environ[name]) for name in ("HOME", "HF_HOME", "HF_HUB_CACHE") if os.environ.get(name)]
    for manifest in data.home().glob("*/manifest.json"):
        with contextlib.suppress(OSError, ValueError, KeyError):
            source = str(json.loads(manifest.read_bytes())["settings"]["source"])
            places += [data.local_folder(source)] if source.startswith("local:") else []
    system = {Path(path).resolve() for path in SYSTEM}  # which some accounts have for a HOME
    return [path for place in places if (path := place.resolve()) not in system]


def tree(reads: Iterable[Path], writes: Iterable[Path], secrets: Iterable[Path]) -> dict[Path, str]:
    """Path → read, write or hidden, parents first; what lies deeper overrides, and what changes nothing is left out."""
    order = {"hidden": 0, "read": 1, "write": 2}
    asked = [(p.resolve(), how) for how, paths in zip(order, (secrets, reads, writes), strict=True) for p in paths]
    found: dict[Path, str] = {}
    for path, how in sorted(asked, key=lambda entry: (len(entry[0].parts), order[entry[1]])):
        above = next((found[p] for p in (path, *path.parents) if p in found), "")
        if how != above and (above or how != "hidden"):
            found[path] = how
    return found


def _around(path: Path, plan: Mapping[Path, str]) -> list[Path]:
    """The path, or, where something in it is hidden, what lies around that: Landlock allows, and cannot except."""
    if plan.get(path) == "hidden":
        return []
    if not any(how == "hidden" and path in p.parents for p, how in plan.items()):
        return [path]
    with contextlib.suppress(OSError):
        return [p for child in sorted(path.iterdir()) if not child.is_symlink() for p in _around(child, plan)]
    return []


def _devices(visible: str | None) -> tuple[list[Path], str | None]:
    """What of /dev a run may open, and what CUDA_VISIBLE_DEVICES then has to say: numbers count what can be opened."""
    nodes = [path for name in DEVICES if (path := Path("/dev", name)).exists()]
    if visible == "":
        return nodes, visible
    every = sorted(Path("/dev").glob("nvidia*"))
    cards = {path: int(found[1]) for path in every if (found := GPU_NODES.fullmatch(path.name))}
    leased = [int(number) for number in (visible or "").split(",") if number.isdigit()]
    if not leased or len(leased) >= len(cards):
        return nodes + every, visible
    import pynvml

    pynvml.nvmlInit()
    handles = [pynvml.nvmlDeviceGetHandleByIndex(number) for number in leased]
    minors = {pynvml.nvmlDeviceGetMinorNumber(handle) for handle in handles}
    names = [pynvml.nvmlDeviceGetUUID(handle) for handle in handles]
    names = [name.decode() if isinstance(name, bytes) else name for name in names]
    return nodes + [path for path in every if cards.get(path, min(minors)) in minors], ",".join(names)


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


def rules(
    tier: Tier,
    folder: Path,
    env: Mapping[str, str],
    writable: Sequence[Path],
    ranks: int,
    bounds: Bounds,
    without: Collection[str],
) -> dict[str, Any]:
    """What `nightshift.inside` is told, as JSON takes it."""
    devices, _ = _devices(env.get("CUDA_VISIBLE_DEVICES"))
    reads = [*readable(), *(Path(p) for p in [env.get("PYTHONPYCACHEPREFIX", "")] if p and Path(p).exists())]
    writes = [folder.absolute(), *(path.absolute() for path in writable)]
    plan = tree(reads, writes, [] if "hidden" in without else hidden())
    links = [*reads, *writes, Path(sys.executable)]
    free = [path for p, how in plan.items() if how == "read" for path in _around(p, plan)]
    return asdict(bounds) | {
        "namespaces": tier.namespaces,
        "landlock": tier.landlock,
        "folder": str(folder.absolute()),
        "home": str(folder.resolve() / "home"),
        "tree": [*((str(path), how) for path, how in plan.items()), *((str(path), "device") for path in devices)],
        "links": [str(path) for path in links if path != path.resolve()],
        "read": [str(path) for path in free],
        "write": [*(str(p) for p, how in plan.items() if how == "write"), *map(str, devices), "/proc", "/dev/shm"],
        "measured": [str(path) for path in writes],
        "tasks": bounds.tasks * max(1, ranks),
        "memory_cap": _container_memory(),
        "without": list(without),
        "tcp": ranks > 1 or tier.namespaces,  # without them any port is one of the machine's
    }


def _container_memory() -> int:
    """Bytes that a container leaves this process, by cgroup v2 or v1; 0 where it sets no limit."""
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):
            return int(Path("/sys/fs/cgroup", name).read_text())
    return 0


def spawn(
    tier: Tier,
    argv: Sequence[str],
    folder: Path,
    log: IO[bytes],
    *,
    env: Mapping[str, str] = {},
    writable: Sequence[Path] = (),
    pass_fds: Sequence[int] = (),
    ranks: int = 0,
    bounds: Bounds | None = None,
    without: Collection[str] = (),
) -> subprocess.Popen[bytes]:
    """Starts argv in `folder`, which it may write, and with it `writable` and a few devices; the rest it may not.

    `ranks` is how many processes train; 0 is a model server, which maps GPU memory of the scorer's, and so keeps the
    machine's IPC namespace there. `without` names defences to leave out: for tests, which show what each is there for.
    To be called from the main thread: the lifeline is cut when the thread that spawned ends.
    """
    variables = environment(folder, make_face(folder), env)
    told = rules(tier, folder, variables, writable, ranks, bounds or BOUNDS, without)
    _, visible = _devices(variables.get("CUDA_VISIBLE_DEVICES"))
    if visible is not None:
        variables["CUDA_VISIBLE_DEVICES"] = visible
    apart = ["--ipc"] if (ranks or not visible) and "ipc" not in without else []
    if not tier.namespaces and "adopt" not in without:
        become_subreaper()  # a run that kills its warden leaves its processes to this one
    chain = [*LIFELINE, *([*NAMESPACES, *apart] if tier.namespaces else [])]
    return subprocess.Popen(
        [*chain, sys.executable, "-I", "-S", "-c", ENTER, json.dumps(told), "--", *argv],
        cwd=folder,
        env=variables,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        pass_fds=pass_fds,
        start_new_session=True,
    )


# The end


def end(process: subprocess.Popen[bytes]) -> bool:
    """Ends what is below the process, then it, and waits until all are gone. False where some outlived GONE_WITHIN_S.

    The first process of a pid namespace is gone when the rest is; a warden elsewhere ends when it has ended all the
    others; and where the run has killed its warden, what is left has become a child of this process.
    """
    deadline = time.monotonic() + GONE_WITHIN_S
    pids = descendants(process.pid)[:WATCHED]
    process.send_signal(LIFELINE_SIGNAL)
    gone = _killed(pids, process.pid, deadline)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(max(0.0, deadline - time.monotonic()))
    gone = process.returncode is not None and gone
    process.kill()
    process.wait()
    while gone and (left := _adopted()):
        pids = [pid for child in left for pid in (child, *descendants(child))]
        gone = _killed(pids, os.getpgrp(), deadline)
        for pid in left:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
    return gone


def _adopted() -> list[int]:
    """Children of this process that a run has left: what a run starts can gain no privilege, and shows it."""
    if status_of(os.getpid()).get("NoNewPrivs") != "0":
        return []
    statuses = {pid: status_of(pid) for pid in descendants(os.getpid())}
    ours = str(os.getpid())
    left = [pid for pid, found in statuses.items() if found.get("PPid") == ours and found.get("NoNewPrivs") == "1"]
    return left[:WATCHED]


def _killed(pids: Iterable[int], spared_group: int, deadline: float) -> bool:
    """Whether all of these are gone by then. Their process groups go at one stroke: in a storm that is what counts."""
    fds, gone = [], True
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            fds.append(os.pidfd_open(pid))
            signal.pidfd_send_signal(fds[-1], signal.SIGKILL)
            if (group := os.getpgid(pid)) != spared_group:
                os.killpg(group, signal.SIGKILL)
    for fd in fds:
        ended = select.poll()
        ended.register(fd, select.POLLIN)
        gone = bool(ended.poll(1000 * max(0.0, deadline - time.monotonic()))) and gone
        os.close(fd)
    return gone
