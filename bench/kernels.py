"""train.py's kernels beside their plain forms: python bench/kernels.py [--rows 64 --seq-len 2048]

One line a kernel, at the shapes of train.py's GPU recipe: median milliseconds of the forward and the backward pass
together, by our kernel, by the plain form compiled, and by the plain form as it is, all in bfloat16 on normal numbers.
Beside them two floors. Bytes: what goes into each pass, what comes out and what is kept between them, once each, at the
speed of a large copy on this card, measured first. Arithmetic: the matrix products at the datasheet's rate. The errors
are the greatest relative ones, of the output and of each gradient, of one row against float64.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from machine import error, failure, forward_backward, head, heading, milliseconds, peak_flops, row
from torch import Tensor

import train

DEVICE, DTYPE = torch.device("cuda"), torch.bfloat16
VOCAB = 8192
NAN = float("nan")


@dataclass(frozen=True)
class Kernel:
    """What is compared: functions of what `inputs` makes for so many rows; `exact` takes it in float64 on a CPU."""

    name: str
    inputs: Callable[[int], list[Tensor]]
    ours: Callable[..., Tensor]
    plain: Callable[..., Tensor]
    exact: Callable[..., Tensor]
    bytes_moved: Callable[[int], float]  # by rows
    flops: Callable[[int], float]


def leaf(*shape: int, scale: float = 1.0) -> Tensor:
    return (scale * torch.randn(shape, device=DEVICE)).to(DTYPE).requires_grad_()


def angles(seq_len: int, head_dim: int) -> list[Tensor]:
    turn = torch.outer(torch.arange(seq_len, device=DEVICE), torch.rand(head_dim // 2, device=DEVICE))
    return [turn.cos(), turn.sin()]


def plain_heads(qkv: Tensor, extra: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """train.finish_heads as a CPU takes it, rounded at the end."""
    cos, sin = (x[:, None, None] for x in (cos, sin))
    a, b = F.rms_norm(qkv[:, :, :2], qkv.shape[-1:], eps=train.EPS).chunk(2, dim=-1)
    turned = torch.cat((a * cos + b * sin, b * cos - a * sin), dim=-1)
    return torch.cat((turned.to(qkv.dtype), (qkv[:, :, 2] + extra).unsqueeze(2)), dim=2)


def heads_kernel(recipe: train.Recipe, seq_len: int) -> Kernel:
    """Of 3 + 1 in and 3 out; backward of 3 gradients, q and k in, and 3 out."""
    shape = seq_len, recipe.heads, recipe.head_dim
    turn = angles(seq_len, recipe.head_dim)
    return Kernel(
        "heads: norm, rotation, value embedding",
        lambda rows: [leaf(rows, shape[0], 3, *shape[1:]), leaf(rows, *shape), *turn],
        lambda qkv, extra, cos, sin: train.heads(qkv, extra, cos, sin, False),
        plain_heads,
        lambda qkv, extra, cos, sin: train.finish_heads(qkv, extra, (cos, sin)),
        lambda rows: 2 * rows * seq_len * recipe.dim * (7 + 8),
        lambda rows: NAN,
    )


def sliding_kernel(recipe: train.Recipe, seq_len: int) -> Kernel:
    """3 in, 1 out; backward 3 + 1 + 1 in, 3 out; two products of each pair forward, five backward."""
    window = recipe.short_window
    pairs = sum(min(i + 1, window) for i in range(seq_len))
    mask = torch.ones(seq_len, seq_len, dtype=torch.bool, device=DEVICE).tril().triu(1 - window)

    def plain(qkv: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in qkv.unbind(2))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)

    return Kernel(
        f"sliding: attention, window {window}",
        lambda rows: [leaf(rows, seq_len, 3, recipe.heads, recipe.head_dim)],
        lambda qkv: train.sliding(qkv, window)[0],
        plain,
        lambda qkv: train.attend(qkv, window),
        lambda rows: 2 * rows * seq_len * recipe.dim * (4 + 8),
        lambda rows: 14 * rows * pairs * recipe.dim,
    )


def plain_mlp(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return F.linear(F.relu(F.linear(x, up)).square(), down)


def mlp_kernel(recipe: train.Recipe, seq_len: int) -> Kernel:
    """x in, y and the hidden layer out; backward the gradient, x and the hidden layer in, one gradient out; weights."""
    dim, hidden = recipe.dim, recipe.mlp_ratio * recipe.dim
    return Kernel(
        "mlp: ReLU² in both products with the hidden layer",
        lambda rows: [
            leaf(rows * seq_len, dim),
            leaf(hidden, dim, scale=dim**-0.5),
            leaf(dim, hidden, scale=hidden**-0.5),
        ],
        lambda x, up, down: train.mlp(x, up, down)[0],
        plain_mlp,
        plain_mlp,
        lambda rows: 2 * (rows * seq_len * (5 * dim + 2 * hidden) + 6 * dim * hidden),
        lambda rows: 12 * rows * seq_len * dim * hidden,
    )


def plain_loss(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logits = F.linear(x / train.SOFTCAP, weight).flatten(0, -2).float()
    return F.cross_entropy(train.SOFTCAP * torch.tanh(logits), targets.flatten())


def loss_kernel(recipe: train.Recipe, seq_len: int) -> Kernel:
    """x and the head in, logits kept; backward logits, x and the head in, two gradients out."""
    dim = recipe.dim
    return Kernel(
        f"soft_capped_loss: vocabulary {VOCAB}",
        lambda rows: [
            leaf(rows, seq_len, dim),
            leaf(VOCAB, dim, scale=3 * dim**-0.5),
            torch.randint(VOCAB, (rows, seq_len), device=DEVICE),
        ],
        lambda x, weight, targets: train.soft_capped_loss(x, weight, targets, VOCAB),
        plain_loss,
        lambda x, weight, targets: train.soft_capped_loss(x, weight, targets, VOCAB),
        lambda rows: 2 * (rows * seq_len * (3 * dim + 2 * VOCAB) + 3 * VOCAB * dim),
        lambda rows: 6 * rows * seq_len * VOCAB * dim,
    )


def copy_bandwidth(size: int = 2**32) -> float:
    """Bytes a second that a copy of `size` bytes reads and writes."""
    source = torch.randint(256, (size,), dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * size / (milliseconds(lambda: target.copy_(source)) * 1e-3)


def forms(kernel: Kernel) -> Iterator[Callable[..., Tensor]]:
    """Ours, the plain one compiled, the plain one."""
    yield kernel.ours
    torch.compiler.reset()
    yield torch.compile(kernel.plain, dynamic=False)
    yield kernel.plain


def measured(kernel: Kernel, rows: int) -> tuple[list[object], list[object]]:
    """Milliseconds of each form, and its error; a form that fails says so instead."""
    times: list[object] = []
    errors: list[object] = []
    for form in forms(kernel):
        try:
            errors.append(f"{error(form, kernel.exact, kernel.inputs(1)):.1e}")
            times.append(milliseconds(forward_backward(form, kernel.inputs(rows))))
        except Exception as reason:  # a failure is a figure too
            times.append(failure(reason))
            errors += [""] * (len(times) - len(errors))
    return times, errors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    recipe = train.recipe_for(torch.device("cuda"), VOCAB)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--seq-len", type=int, default=recipe.seq_len)
    args = parser.parse_args()
    torch.manual_seed(1)
    bandwidth = copy_bandwidth()
    sizes = f"{args.rows} rows of {args.seq_len}, width {recipe.dim}; a copy moves {bandwidth / 1e12:.2f} TB/s"
    print(heading(1), sizes, "", sep="\n\n", end="")
    names = ["ours ms", "compiled ms", "eager ms", "bytes' floor ms", "arithmetic's floor ms"]
    print(head("kernel", *names, "our error", "compiled", "eager"), flush=True)
    for make in (heads_kernel, sliding_kernel, mlp_kernel, loss_kernel):
        kernel = make(recipe, args.seq_len)
        times, errors = measured(kernel, args.rows)
        floors = 1e3 * kernel.bytes_moved(args.rows) / bandwidth, 1e3 * kernel.flops(args.rows) / peak_flops()
        print(row(kernel.name, *times, *floors, *errors), flush=True)


if __name__ == "__main__":
    main()
