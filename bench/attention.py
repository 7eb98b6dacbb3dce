"""Sliding attention beside what else there is: python bench/attention.py [--rows 64 --windows 128,256,512,1024 ...]

Prints one line an implementation and window: median milliseconds of the forward pass (that keeps what the backward pass
needs), of the backward pass (the difference of the other two), and of both, on qkv of shape [rows, seq_len, 3, heads,
head_dim] in bfloat16, normal numbers. Each call of both makes a graph of its own. TFLOP/s count 4 * head_dim
operations forward and 10 * head_dim backward for each pair of positions that sees one another. The error is the
greatest relative one, of the output and of the gradient, of one row against float64.

    train.sliding      the kernels of train.py
    FlexAttention      torch.compile(flex_attention) with a block mask of the window
    FlashAttention-3   flash_attn_interface, where it is installed
    cuDNN              scaled_dot_product_attention, full causal: what a window saves
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from machine import error, failure, forward_backward, head, heading, milliseconds, row
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import train

DEVICE, DTYPE = torch.device("cuda"), torch.bfloat16
Attend = Callable[[Tensor], Tensor]  # qkv [B, T, 3, H, D] -> [B, T, H, D]


def ours(window: int) -> Attend:
    return lambda qkv: train.sliding(qkv, window)[0]


def flex(window: int, seq_len: int) -> Attend:
    def sees(_row: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (query - key < window)

    torch.compiler.reset()  # a window is a graph of its own, of which a compiler keeps few
    mask = create_block_mask(sees, None, None, seq_len, seq_len, device=DEVICE.type)
    compiled = torch.compile(flex_attention, dynamic=False)

    def attend(qkv: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in qkv.unbind(2))
        return compiled(q, k, v, block_mask=mask).transpose(1, 2)

    return attend


def flash_3(window: int) -> Attend:
    """Raises ModuleNotFoundError where it is not installed."""
    from flash_attn_interface import flash_attn_func

    assert hasattr(torch.ops.flash_attn_3, "fwd"), "flash_attn_interface registers no torch.ops.flash_attn_3.fwd"

    def attend(qkv: Tensor) -> Tensor:
        out = flash_attn_func(*qkv.unbind(2), causal=True, window_size=(window - 1, 0))
        return out[0] if isinstance(out, tuple) else out  # earlier versions give the softmax's denominators too

    return attend


def cudnn(qkv: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in qkv.unbind(2))
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def implementations(windows: list[int], seq_len: int) -> Iterator[tuple[str, int, Callable[[], Attend]]]:
    """Name, window, and what makes the function; a window of seq_len is full causal attention."""
    installed = importlib.util.find_spec("flash_attn_interface") is not None
    for window in windows:
        yield "train.sliding", window, partial(ours, window)
        yield "FlexAttention", window, partial(flex, window, seq_len)
        if installed:
            yield "FlashAttention-3", window, partial(flash_3, window)
    yield "cuDNN, full causal", seq_len, lambda: cudnn


def measured(attend: Attend, qkv: Tensor, window: int) -> list[object]:
    """Milliseconds forward, backward, both; TFLOP/s of both; relative error."""
    (B, T, _, H, D) = qkv.shape
    wrong = error(attend, lambda x: train.attend(x, window), [qkv[:1].detach().clone().requires_grad_()])
    forward, both = milliseconds(lambda: attend(qkv)), milliseconds(forward_backward(attend, [qkv]))
    pairs = sum(min(i + 1, window) for i in range(T))
    return [forward, both - forward, both, f"{14 * pairs * B * H * D / both / 1e9:.0f}", f"{wrong:.1e}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag, size in {"rows": 64, "seq-len": 2048, "heads": 5, "head-dim": 128}.items():
        parser.add_argument(f"--{flag}", type=int, default=size)
    parser.add_argument("--windows", type=lambda text: [int(w) for w in text.split(",")], default=[128, 256, 512, 1024])
    args = parser.parse_args()
    torch.manual_seed(1)
    shape = args.rows, args.seq_len, 3, args.heads, args.head_dim
    print(heading(1), f"qkv {list(shape)}, {DTYPE}", "", sep="\n\n", end="")
    print(head("implementation", "window", "forward ms", "backward ms", "both ms", "TFLOP/s", "error"), flush=True)
    qkv = torch.randn(shape, device=DEVICE, dtype=DTYPE).requires_grad_()
    for name, window, make in implementations(args.windows, args.seq_len):
        try:
            figures = measured(make(), qkv, window)
        except Exception as reason:  # a failure is a row too
            figures = [failure(reason), *[""] * 4]
        print(row(name, window, *figures), flush=True)
    if importlib.util.find_spec("flash_attn_interface") is None:
        print(row("FlashAttention-3", "", "not installed", *[""] * 4))


if __name__ == "__main__":
    main()
