"""Which devices there are, leasing them, waiting until one is idle, and what they are doing meanwhile."""

from __future__ import annotations

import contextlib
import fcntl
import importlib.metadata
import os
import resource
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nightshift.sandbox import descendants
from nightshift.values import Stop

BUSY_MB = 1024.0  # memory in use on a GPU that nobody of ours holds, above which it counts as busy
IDLE_PATIENCE_S = 600.0
# Dense bf16 rates by NVIDIA's datasheets, in FLOP/s, for the MFU that people are shown.
PEAK_FLOPS = {"H100": 989.5e12, "H200": 989.5e12, "H20": 148e12, "B200": 2250e12, "A100": 312e12, "4090": 165.2e12}


@dataclass(frozen=True)
class Lease:
    """The devices of one night: GPU numbers as NVML counts them, none for a CPU."""

    gpus: tuple[int, ...]
    name: str  # "NVIDIA H200", "AMD EPYC (2 cores)"

    @property
    def kind(self) -> str:
        """The word that torch uses."""
        return "cuda" if self.gpus else "cpu"

    @property
    def environment(self) -> dict[str, str]:
        """What makes a process see these devices and no others, and use a fair share of the cores."""
        if not self.gpus:
            return {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": str(threads())}
        return {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": ",".join(map(str, self.gpus))}

    @property
    def peak_flops(self) -> float:
        """Of all leased GPUs together; 0 where it is not known."""
        for model, flops in PEAK_FLOPS.items():
            if model in self.name and self.gpus:
                return flops * len(self.gpus)
        return 0.0


def _nvml() -> Any | None:
    """NVML, ready to be asked, or None on a machine without it."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    return pynvml


def gpu_names() -> list[str]:
    """The GPUs that this machine shows, in NVML's order."""
    nvml = _nvml()
    if nvml is None:
        return []
    names = [nvml.nvmlDeviceGetName(nvml.nvmlDeviceGetHandleByIndex(i)) for i in range(nvml.nvmlDeviceGetCount())]
    return [n.decode() if isinstance(n, bytes) else n for n in names]


def torch_has_cuda() -> bool:
    """Whether the installed torch is a CUDA build, without importing it."""
    return "+cpu" not in importlib.metadata.version("torch")


def default_profile() -> str:
    """`single` where there is a GPU that torch can use, else `demo`."""
    return "single" if gpu_names() and torch_has_cuda() else "demo"


def cpu_name() -> str:
    """The processor's model and how many of its cores this process may use."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "CPU")
    return f"{model} ({cores()} cores)"


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def threads() -> int:
    """Threads for a training process on a CPU: one core is left to the processes that wait beside it."""
    return max(1, cores() - 1)


@contextlib.contextmanager
def lease(gpus: int, wait: bool = True) -> Iterator[Lease]:
    """Holds so many idle GPUs, or the CPU for 0, until the block ends. Waits for them; Stop where there are too few.

    A lease is an flock on a file that all nights of this machine share. Without `wait` it is the first GPUs that this
    process may see, unasked: a run by hand already sits on them.
    """
    if gpus == 0:
        yield Lease((), cpu_name())
        return
    names = gpu_names()
    if len(names) < gpus:
        raise Stop(f"the profile asks for {gpus} GPUs, this machine shows {len(names)}: `python loop.py doctor`")
    with contextlib.ExitStack() as held:
        chosen = _wait_for_idle(gpus, len(names), held) if wait else _visible(len(names))[:gpus]
        count = "" if gpus == 1 else f" ×{gpus}"
        yield Lease(chosen, names[chosen[0]] + count)


def _visible(total: int) -> tuple[int, ...]:
    """The GPUs that CUDA_VISIBLE_DEVICES leaves to this process; all of them where it says nothing by number."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    return tuple(int(n) for n in named if n.strip().isdigit() and int(n) < total) or tuple(range(total))


def _wait_for_idle(gpus: int, total: int, held: contextlib.ExitStack) -> tuple[int, ...]:
    deadline = time.monotonic() + IDLE_PATIENCE_S
    while True:
        chosen: list[int] = []
        with contextlib.ExitStack() as attempt:
            for gpu in range(total):
                if len(chosen) < gpus and used_mb(gpu) < BUSY_MB and _lock(gpu, attempt):
                    chosen.append(gpu)
            if len(chosen) == gpus:
                held.push(attempt.pop_all())
                return tuple(chosen)
        if time.monotonic() > deadline:
            raise Stop(f"no {gpus} idle GPUs within {IDLE_PATIENCE_S:.0f} s: `nvidia-smi` says who holds them")
        time.sleep(2.0)


def _lock(gpu: int, stack: contextlib.ExitStack) -> bool:
    path = Path(tempfile.gettempdir()) / f"nightshift-gpu-{gpu}.lock"
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        return False
    stack.callback(os.close, fd)
    return True


def used_mb(gpu: int) -> float:
    """Memory in use on a GPU, by whomever."""
    nvml = _nvml()
    assert nvml is not None
    return float(nvml.nvmlDeviceGetMemoryInfo(nvml.nvmlDeviceGetHandleByIndex(gpu)).used) / 2**20


class Meter:
    """Samples one run's memory and its devices' health from outside; the run is never asked."""

    def __init__(self, lease: Lease, pid: int) -> None:
        self.lease, self.pid = lease, pid
        self.peak_mb = 0.0
        self.unhealthy = ""
        self._before = {gpu: used_mb(gpu) for gpu in lease.gpus}

    def sample(self) -> None:
        """To be called now and then while the run lasts."""
        if not self.lease.gpus:
            total = sum(_resident_mb(pid) for pid in [self.pid, *descendants(self.pid)])
            self.peak_mb = max(self.peak_mb, total)
            return
        grown = max(used_mb(gpu) - self._before[gpu] for gpu in self.lease.gpus)
        self.peak_mb = max(self.peak_mb, grown)
        for gpu in self.lease.gpus:
            self.unhealthy = self.unhealthy or _throttled(gpu)


def _resident_mb(pid: int) -> float:
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, IndexError):
        return 0.0
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def _throttled(gpu: int) -> str:
    """What slows a GPU down that its load does not explain: heat, or power cut from outside."""
    nvml = _nvml()
    assert nvml is not None
    reasons = nvml.nvmlDeviceGetCurrentClocksEventReasons(nvml.nvmlDeviceGetHandleByIndex(gpu))
    bad = {
        "thermal slowdown": nvml.nvmlClocksEventReasonSwThermalSlowdown | nvml.nvmlClocksEventReasonHwThermalSlowdown,
        "power brake": nvml.nvmlClocksEventReasonHwPowerBrakeSlowdown,
    }
    return next((f"GPU {gpu}: {name}" for name, mask in bad.items() if reasons & mask), "")


def peak_memory_mb_of_this_process(kind: str) -> float:
    """For a run by hand, which has nobody to watch it."""
    if kind == "cuda":
        import torch

        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
