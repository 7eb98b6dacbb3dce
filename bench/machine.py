"""What the scripts of this folder share: naming the machine, rows of a table, timing and checking on a GPU."""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import triton
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from nightshift import devices  # noqa: E402


def heading(gpus: int | None = None) -> str:
    """The hardware, of which so many GPUs are used (None: all), and the versions."""
    names = devices.gpu_names()[:gpus]
    hardware = f"{len(names)} × {names[0]}" if names else devices.cpu_name()
    versions = f"torch {torch.__version__}, triton {triton.__version__}, Python {platform.python_version()}"
    return f"{hardware}; {versions}"


def row(*cells: object) -> str:
    """One line of a Markdown table; a float is shown with three digits after the point, NaN as a dash."""
    return f"| {' | '.join(_shown(cell) for cell in cells)} |"


def head(*names: str) -> str:
    """The first two lines of a Markdown table; the first column is text, the others are figures."""
    return "\n".join((row(*names), "|".join(["", "---", *["---:"] * (len(names) - 1), ""])))


def _shown(cell: object) -> str:
    if isinstance(cell, float):
        return "—" if cell != cell else f"{cell:.3f}"
    return str(cell).replace("|", "/").replace("\n", " ")


def milliseconds(function: Callable[[], object]) -> float:
    """Median of some hundred calls on the GPU, the cache cleared before each."""
    from triton.testing import do_bench

    return float(do_bench(function, warmup=100, rep=400, return_mode="median"))


def forward_backward(function: Callable[..., Tensor], inputs: Sequence[Tensor]) -> Callable[[], None]:
    """A call of `function` and of its backward pass, with a random gradient of its output; a fresh graph each time."""
    grad = torch.randn_like(function(*inputs))

    def step() -> None:
        for x in inputs:
            x.grad = None
        function(*inputs).backward(grad)

    return step


def error(function: Callable[..., Tensor], exact: Callable[..., Tensor], inputs: Sequence[Tensor]) -> float:
    """The greatest relative error ||a - b|| / ||b|| of the output and of each gradient, b of `exact` in float64."""
    twins = [x.detach().cpu() for x in inputs]
    twins = [x.double() if x.is_floating_point() else x for x in twins]
    leaves = [x for x in inputs if x.requires_grad]
    exact_leaves = [x.requires_grad_() for x, y in zip(twins, inputs, strict=True) if y.requires_grad]
    out, truth = function(*inputs), exact(*twins)
    grad = torch.randn_like(out)
    ours = [out, *torch.autograd.grad(out, leaves, grad)]
    right = [truth, *torch.autograd.grad(truth, exact_leaves, grad.cpu().double())]
    pairs = zip(ours, right, strict=True)
    return max(((a.detach().cpu().double() - b).norm() / b.norm()).item() for a, b in pairs)


def failure(reason: BaseException) -> str:
    """Why a row of a table has no figures: the first line of an exception, shortened."""
    lines = str(reason).strip().splitlines() or [""]
    return f"failed: {type(reason).__name__}: {lines[0][:100]}"


def peak_flops() -> float:
    """Of this machine's first GPU in bfloat16, dense, by its datasheet; NaN where it is not known."""
    name = devices.gpu_names()[0] if devices.gpu_names() else ""
    return next((flops for model, flops in devices.PEAK_FLOPS.items() if model in name), float("nan"))
