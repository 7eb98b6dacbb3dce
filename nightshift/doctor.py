"""Is this machine ready for a night? `python loop.py doctor`: a line a matter; ok, or what is wrong and what mends it.

Python and its packages come first and are looked at with the standard library alone, so that this module also runs,
as `python -m nightshift.doctor`, where something that the rest needs is missing. torch is imported only where there is
a GPU to try it on, in a process of its own.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from nightshift.config import Config

OLDEST_PYTHON, OLDEST_GIT = (3, 11), (2, 23)
ROOM_GB, LEAST_GB = 10.0, 1.0  # free disk, below which a night may run full, or cannot be begun
SHM_GB = 1.0  # of /dev/shm, which NCCL uses between the ranks of one host
TRIAL_S = 60.0
TRIAL = "import torch; torch.ones(8, device='cuda').sum().item(); print(torch.version.cuda)"
COMPARE: dict[str, Callable[[tuple[int, ...], tuple[int, ...]], bool]] = {
    ">=": lambda a, b: a >= b,
    "<=": lambda a, b: a <= b,
    "==": lambda a, b: a == b,
    "!=": lambda a, b: a != b,
    ">": lambda a, b: a > b,
    "<": lambda a, b: a < b,
}
USER_NAMESPACES = (  # what may forbid them to ordinary users: the setting, its value then, and what allows them
    ("kernel/unprivileged_userns_clone", "0", "1"),  # Debian
    ("kernel/apparmor_restrict_unprivileged_userns", "1", "0"),  # Ubuntu
    ("user/max_user_namespaces", "0", "15000"),
)


@dataclass(frozen=True)
class Line:
    """One matter. `note`: a night runs all the same; `WRONG`: it could not."""

    mark: Literal["ok", "note", "WRONG"]
    matter: str
    text: str

    def __str__(self) -> str:
        return f"{self.mark:<6}{self.matter:<10}{' '.join(self.text.split())}"


def doctor(root: Path) -> int:
    """Prints every line as it is found; 1 where a night could not run, else 0."""
    wrong = False
    for line in _examine(root):
        print(line, flush=True)
        wrong = wrong or line.mark == "WRONG"
    print("a night cannot run yet: mend what is WRONG, then ask again" if wrong else "ready: `make night`")
    return int(wrong)


def _examine(root: Path) -> Iterator[Line]:
    basics = [_python(), *_packages(root / "pyproject.toml")]
    yield from basics
    if any(line.mark == "WRONG" for line in basics):
        yield Line("note", "others", "not looked at before these are mended: `python -m nightshift.doctor`")
        return
    from nightshift import devices

    gpus = devices.gpu_names()
    yield from _git(root)
    yield from _sandbox()
    config, lines = _config(root / "config.yaml", devices.default_profile())
    yield from lines
    yield from _gpus(gpus)
    yield from _compiler(bool(gpus) and devices.torch_has_cuda())
    if config is not None:
        yield _data(config)
        yield _key(config)
    yield from _disk(root)
    yield _shared_memory(len(gpus))


# Python and its packages


def _python() -> Line:
    version = sys.version.split()[0]
    if sys.version_info < OLDEST_PYTHON:
        oldest = ".".join(map(str, OLDEST_PYTHON))
        text = f"{version}, and nightshift needs {oldest} or later: `make clean && make night PYTHON=python3.12`"
        return Line("WRONG", "python", text)
    return Line("ok", "python", f"{version}, {sys.executable}")


def _packages(pyproject: Path) -> Iterator[Line]:
    """What pyproject.toml asks for, against what is installed."""
    import tomllib

    wanted = tomllib.loads(pyproject.read_text())["project"]["dependencies"]
    faults = [fault for requirement in wanted if (fault := unmet(requirement))]
    if faults:
        yield Line("WRONG", "packages", f"{', '.join(faults)}: `{sys.executable} -m pip install -e .`")
    else:
        yield Line("ok", "packages", f"all {len(wanted)}, torch {importlib.metadata.version('torch')} among them")


def unmet(requirement: str) -> str:
    """What is wrong about a requirement such as "torch>=2.11,<=2.13.0", as installed; "" where it is met.

    Reads what pyproject.toml uses: releases in numbers; "+cpu" and the like play no part, as in PEP 440.
    """
    name, bounds = re.fullmatch(r"([\w.-]+)(.*)", requirement.replace(" ", ""), re.DOTALL).groups()  # type: ignore[union-attr]
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return f"no {name}"
    for bound in filter(None, bounds.split(",")):
        operator, limit = re.fullmatch(r"([<>=!]+)(.*)", bound).groups()  # type: ignore[union-attr]
        if not COMPARE[operator](_release(version), _release(limit)):
            return f"{name} {version} where {bounds} is wanted"
    return ""


def _release(version: str) -> tuple[int, ...]:
    """(2, 13, 0, 0) of "2.13.0+cpu"; four numbers, so that 2.13 and 2.13.0 are the same."""
    found = re.match(r"\d+(\.\d+)*", version)
    numbers = [int(part) for part in found[0].split(".")] if found else []
    return (*numbers, 0, 0, 0, 0)[:4]


# The repository


def _git(root: Path) -> Iterator[Line]:
    """The version, and whether a night could begin from what is committed."""
    if not shutil.which("git"):
        yield Line("WRONG", "git", "is not installed: `sudo apt install git`")
        return
    from nightshift.branch import IN_PROGRESS
    from nightshift.plumbing import DETACHED, Repository
    from nightshift.values import Stop

    repo = Repository(root, "`python loop.py run`")
    version = repo.git("version").decode().split()[2]
    if _release(version) < OLDEST_GIT:
        yield Line("WRONG", "git", f"{version}, and {'.'.join(map(str, OLDEST_GIT))} or later is needed")
    status, _, words = repo.run("rev-parse", "--show-toplevel")
    if status:
        begin = "" if "dubious" in words else f": `cd {root} && git init && git add -A && git commit -m start`"
        yield Line("WRONG", "git", words + begin)
        return
    head = repo.resolve("HEAD^{commit}")
    if not head or not repo.resolve(f"{head}:./train.py"):
        yield Line("WRONG", "git", "train.py is in no commit yet: `git add train.py && git commit -m train.py`")
        return
    try:
        repo.await_lock(needed=False)
    except Stop as stop:
        yield Line("WRONG", "git", str(stop))
    for file, command in IN_PROGRESS.items():
        if (repo.places[0] / file).exists():
            text = f"a {command} is in progress: `git {command} --continue` or `git {command} --abort`"
            yield Line("WRONG", "git", text)
    state = repo.state()
    on = "detached" if state.on == DETACHED else f"on {state.on}"
    if state.edits:
        text = f"train.py has edits that are not committed ({state.edits}): `git commit -m train.py train.py`"
        yield Line("WRONG", "git", text)
    else:
        yield Line("ok", "git", f"{version}; train.py is as committed, HEAD is {head[:10]}, {on}")


# The sandbox


def _sandbox() -> Iterator[Line]:
    """What shuts a candidate in, found by a run that looks for a file that it must not find."""
    from nightshift import sandbox

    missing = [name for name in ("setpriv", "unshare") if not shutil.which(name)]
    if missing:
        mark: Literal["note", "WRONG"] = "WRONG" if "setpriv" in missing else "note"
        yield Line(mark, "sandbox", f"no {' and no '.join(missing)} on PATH: `sudo apt install util-linux`")
        if mark == "WRONG":
            return
    tier = sandbox.probe()
    if not tier.namespaces and not missing:
        text = f"{tier.missing}: runs see each other's processes, and what listens on the network or in /run"
        yield Line("note", "sandbox", f"{text}; {_namespaces_mend()}")
    if not tier.landlock:
        text = "no Landlock, the second lock behind the namespaces" if tier.namespaces else sandbox.EXPOSED
        mend = "a kernel of 5.13 or later has it, with landlock in its lsm= list: `cat /sys/kernel/security/lsm`"
        yield Line("note", "sandbox", f"{text}; {mend}")
    elif tier.namespaces:
        yield Line("ok", "sandbox", str(tier))


def _namespaces_mend(settings: Path = Path("/proc/sys")) -> str:
    """The command that allows user namespaces, as far as the kernel's settings tell what forbids them."""
    for name, forbidding, allowing in USER_NAMESPACES:
        path = settings / name
        if path.is_file() and path.read_text().strip() == forbidding:
            return f"`sudo sysctl -w {name.replace('/', '.')}={allowing}` allows them"
    return "in a container they are allowed from outside: `docker run --security-opt seccomp=unconfined ...`"


# Settings, data, proposer


def _config(path: Path, profile: str) -> tuple[Config | None, list[Line]]:
    """The Config of the profile that a night would run under, and a line on every profile that does not load."""
    import yaml

    from nightshift import config as configuration
    from nightshift.values import Stop

    try:
        config = configuration.load(path, profile)
    except Stop as stop:
        return None, [Line("WRONG", "config", str(stop))]
    lines = []
    names = list(yaml.safe_load(path.read_text())["profiles"])
    for name in names:
        try:
            configuration.load(path, name)
        except Stop as stop:
            lines.append(Line("note", "config", str(stop)))
    return config, lines or [Line("ok", "config", f"{', '.join(names)} load; {profile} fits this machine")]


def _data(config: Config) -> Line:
    """Whether the profile's data is there; a night looks at its digests too, which takes longer."""
    from nightshift import data
    from nightshift.values import Stop

    try:
        dataset = data.open_dataset(config)
    except Stop as stop:
        source = config.source
        if source.startswith("local:") and not (folder := data.local_folder(source)).is_dir():
            return Line("WRONG", "data", f"{folder} is not there: put .parquet, .jsonl or .txt files into it")
        return Line("note", "data", f"{stop}; a night begins with that")
    return Line("ok", "data", f"{config.source} in {dataset.root}, {len(dataset.shards)} shards of training tokens")


def _key(config: Config) -> Line:
    """Which proposer a night would have. A key is never shown."""
    if os.environ.get("ANTHROPIC_API_KEY"):
        return Line("ok", "proposer", f"{config.proposer}; ANTHROPIC_API_KEY is set, so auto is anthropic")
    text = "ANTHROPIC_API_KEY is not set"
    if config.proposer == "anthropic":
        return Line("WRONG", "proposer", f"{text}, and config.yaml asks for anthropic: `export ANTHROPIC_API_KEY=...`")
    return Line("ok", "proposer", f"{config.proposer}; {text}, so auto is knobs, which needs none")


# The hardware


def _gpus(names: list[str]) -> Iterator[Line]:
    """Driver, torch's build, and who holds which GPU."""
    from nightshift import devices

    if not names:
        if shutil.which("nvidia-smi"):
            yield Line("note", "gpu", "none answers, so nights run on the CPU; `nvidia-smi` is here, and says why")
        else:
            yield Line("ok", "gpu", f"none; nights run on {devices.cpu_name()}")
        return
    import pynvml

    driver = pynvml.nvmlSystemGetDriverVersion()
    if not devices.torch_has_cuda():
        build = importlib.metadata.version("torch")
        text = f"driver {driver}, and torch {build} cannot use it: `{sys.executable} -m pip install --force-reinstall"
        yield Line("note", "gpu", f"{text} torch` takes the CUDA build, unless something pins another")
    else:
        yield _trial(str(driver))
    for number, name in enumerate(names):
        handle = pynvml.nvmlDeviceGetHandleByIndex(number)
        total = pynvml.nvmlDeviceGetMemoryInfo(handle).total / 2**30
        used = devices.used_mb(number)
        text = f"GPU {number}: {name}, {total:.0f} GB"
        if used < devices.BUSY_MB:
            yield Line("ok", "gpu", f"{text}, idle")
        else:
            pids = [str(process.pid) for process in pynvml.nvmlDeviceGetComputeRunningProcesses(handle)]
            held = f"by process {', '.join(pids)}" if pids else "by a process that is not shown here"
            yield Line("note", "gpu", f"{text}, {used / 1024:.1f} GB held {held}: a night waits until it is idle")


def _trial(driver: str) -> Line:
    """One sum on the GPU, in a process of its own."""
    try:
        tried = subprocess.run([sys.executable, "-c", TRIAL], capture_output=True, text=True, timeout=TRIAL_S)
    except subprocess.TimeoutExpired:
        text = f"driver {driver}; torch took more than {TRIAL_S:.0f} s to add eight numbers: `nvidia-smi` may say why"
        return Line("WRONG", "gpu", text)
    if tried.returncode:
        last = (tried.stderr.strip().splitlines() or ["no message"])[-1]
        text = f"driver {driver}; torch cannot use it ({last}): `nvidia-smi` says which CUDA it is made for"
        return Line("WRONG", "gpu", text)
    return Line("ok", "gpu", f"driver {driver}; torch computes with CUDA {tried.stdout.strip()}")


def _compiler(cuda: bool) -> Iterator[Line]:
    """torch.compile and triton build their launchers with a C compiler and Python's headers."""
    found = os.environ.get("CC") or next((name for name in ("gcc", "clang", "cc") if shutil.which(name)), "")
    headers = Path(sysconfig.get_paths()["include"], "Python.h")
    if not cuda:
        yield Line("ok", "compiler", f"{found or 'none'}; on a CPU none is needed")
        return
    if not found or not shutil.which(found):
        yield Line("WRONG", "compiler", f"no C compiler ({found or 'gcc, clang, cc'}): `sudo apt install gcc`")
    elif not headers.is_file():
        yield Line("WRONG", "compiler", f"{headers}, which triton includes, is missing: `sudo apt install python3-dev`")
    else:
        yield Line("ok", "compiler", f"{found}, and Python's headers")


def _disk(root: Path) -> Iterator[Line]:
    from nightshift import data

    for path in (root / ".nightshift", data.home()):
        there = next(parent for parent in (path, *path.parents) if parent.exists())
        free = shutil.disk_usage(there).free / 2**30
        if not os.access(there, os.W_OK):
            yield Line("WRONG", "disk", f"{there} cannot be written: `ls -ld {there}` shows whose it is")
        elif free < ROOM_GB:
            text = f"{free:.1f} GB are free at {path}, and a night may need {ROOM_GB:.0f}: `df -h {there}`"
            yield Line("WRONG" if free < LEAST_GB else "note", "disk", text)
        else:
            yield Line("ok", "disk", f"{free:.0f} GB free at {path}")


def _shared_memory(gpus: int, path: Path = Path("/dev/shm")) -> Line:
    size = shutil.disk_usage(path).total / 2**30 if path.is_dir() else 0.0
    if gpus > 1 and size < SHM_GB:
        text = f"{size:.2f} GB in {path}, and NCCL wants more between GPUs: `sudo mount -o remount,size=8G {path}`"
        return Line("note", "memory", f"{text}, or of a container `docker run --shm-size 8g`")
    return Line("ok", "memory", f"{size:.1f} GB of shared memory in {path}")


if __name__ == "__main__":
    sys.exit(doctor(Path(__file__).resolve().parent.parent))
