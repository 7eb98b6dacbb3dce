"""The training run: model, kernels, optimiser, schedules, loop. The one file of nightshift that proposers edit.

A decoder-only transformer of the nanochat and modded-nanogpt family: rotary positions, QK-norm, ReLU² MLP, value
embeddings with a gate per head, hashed n-gram embeddings, sliding windows, soft-capped logits; Muon for the matrices,
AdamW for embeddings and scalars, row-wise RMSprop for the n-grams. A GPU trains it in bfloat16 with torch.compile and
the Triton kernels below, a CPU a small one eagerly in float32; several GPUs under torchrun.

The contract, in full on `nightshift.openrun.OpenRun`: `main()` trains, on every rank, and `load(weights, device)`
rebuilds the trained model: tokens int64 [B, T] -> logits float32 [B, T, V]. Compiling and warming up are off the clock;
every second after the first batch counts. The seed is the run's: one set here would hide the noise of the scores.

Claim, by hand (`NIGHTSHIFT_PROFILE=local NIGHTSHIFT_BUDGET_S=100 NIGHTSHIFT_SEED=1 python train.py`): on one NVIDIA
H200, torch 2.11.0+cu130, triton 3.6, 503 MB of Python source and books, vocabulary 8192: 100 s reach 1.0986 and 1.0978
validation bits per byte (seeds 1 and 2), 966 and 962 steps, 0.95 epochs, 43.6% of the bfloat16 peak.

A constant marked `# knob: log 0.01 0.16` (or lin, int, choice) is one that the knobs proposer may turn in that range;
`# knob[cpu]:` and `# knob[cuda]:` are turned only where that device trains.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
import triton
import triton.language as tl
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.nn.functional import all_gather
from torch.nn.attention import SDPBackend, sdpa_kernel
from triton.tools.tensor_descriptor import TensorDescriptor

import prepare

# ---- Knobs: a GPU ---------------------------------------------------------------------------------------------------

GPU_DEPTH = 9  # knob[cuda]: int 6 12
GPU_HEADS = 5  # knob[cuda]: int 4 8
GPU_HEAD_DIM = 128
GPU_MLP_RATIO = 4  # hidden width of the MLP, in widths of the model
GPU_BATCH_TOKENS = 2**17  # of one optimiser step, over all ranks; grows with the tokens of a run: 2**18 from 1G on
GPU_ROWS = 64  # of a micro-batch on one rank, at most: memory decides, the result does not depend on it
GPU_SEQ_LEN = 2048  # of a training row, at most; a shorter one of the profile holds
GPU_WINDOWS = "SSSSL"  # S: the short window, L: all that came before; repeated over the layers, of which the last is L
GPU_SHORT_WINDOW = 256  # knob[cuda]: choice 128 256 512
GPU_NGRAM_ROWS = 2**19  # of each table; more pay with more unique tokens, and repeated epochs are learnt by heart
GPU_ROPE_BASE = 200_000.0  # knob[cuda]: log 10000 1000000
GPU_MATRIX_LR = 0.04  # knob[cuda]: log 0.01 0.16
GPU_EMBEDDING_LR = 0.9  # knob[cuda]: log 0.2 3.0
GPU_HEAD_LR = 0.008  # knob[cuda]: log 0.001 0.02

# ---- Knobs: where the vocabulary is GPT-2's, as in the NanoGPT speedrun, these stand for those above -----------------

SPEEDRUN_DEPTH = 12
SPEEDRUN_HEADS = 6
SPEEDRUN_BATCH_TOKENS = 2**18
TOTAL_STEPS = 1300  # of a time_to_target run; a val_bpb run ends with its budget

# ---- Knobs: the CPU demo, some 200 steps on one core ----------------------------------------------------------------

CPU_DEPTH = 2  # knob[cpu]: int 1 3
CPU_HEADS = 1
CPU_HEAD_DIM = 64
CPU_MLP_RATIO = 2  # knob[cpu]: int 1 4
CPU_BATCH_TOKENS = 1024  # knob[cpu]: choice 512 1024 2048
CPU_ROWS = 16
CPU_SEQ_LEN = 128  # half of what is scored: attention costs less, and rotary positions carry over
CPU_WINDOWS = "L"
CPU_SHORT_WINDOW = 64
CPU_NGRAM_ROWS = 2**13
CPU_ROPE_BASE = 10_000.0
CPU_MATRIX_LR = 0.08  # knob[cpu]: log 0.02 0.3
CPU_EMBEDDING_LR = 0.5  # knob[cpu]: log 0.1 2.0
CPU_HEAD_LR = 0.012  # knob[cpu]: log 0.003 0.05

# ---- Knobs: both ----------------------------------------------------------------------------------------------------

NGRAMS = (2, 3)  # how many tokens, the present one included, the hashed embeddings speak of: a table each
NGRAM_LR = 1.0  # knob: log 0.1 3.0
GATE_CHANNELS = 32  # of the stream, that the gates of the value embeddings read
SOFTCAP = 15.0  # knob: log 8 40
INIT_SCALE = 0.68
X0_INIT = 0.05  # knob: lin 0.0 0.3
SCALAR_LR = 0.5
ADAM_BETAS = (0.8, 0.95)
X0_BETAS = (0.96, 0.95)
MUON_MOMENTUM = 0.95  # knob: lin 0.85 0.98
MUON_MOMENTUM_START = 0.85
MUON_MOMENTUM_WARMUP = 0.15  # of the run
MUON_BETA2 = 0.95
POLAR_STEPS = 5  # at most the 5 of POLAR_EXPRESS
WEIGHT_DECAY = 0.2  # knob: lin 0.0 0.5
VALUE_WEIGHT_DECAY = 0.003
WARMDOWN = 0.75  # knob: lin 0.3 1.0
FINAL_LR = 0.05  # knob: lin 0.0 0.2
EPS = 1e-6  # of norms


class Recipe(SimpleNamespace):
    """The constants of one kind of run: `depth` is GPU_DEPTH, if `names` says so. Its dtype is that of activations."""

    @property
    def dim(self) -> int:
        return self.heads * self.head_dim

    def slides(self, layer: int) -> bool:
        return self.windows[layer % len(self.windows)] == "S" and layer < self.depth - 1

    def has_value_embedding(self, layer: int) -> bool:
        return (self.depth - 1 - layer) % 2 == 0  # every second one, the last included

    def check(self, seq_len: int, ranks: int) -> None:
        """Raises ValueError, with the constant and the values that work, where no model can be trained."""
        unit, on_gpu = seq_len * ranks, self.dtype == torch.bfloat16
        rows, whole = self.batch_tokens // unit, max(1, self.batch_tokens // unit) * unit
        fit = [r for r in range(1, rows + 1) if rows % r == 0]
        rules = [
            *((getattr(self, size) > 0, size, "1 or more") for size in ("depth", "heads", "mlp_ratio", "ngram_rows")),
            (self.head_dim in (32, 64, 128) or not on_gpu, "head_dim", "32, 64 or 128: what the kernels take"),
            (self.head_dim % 2 == 0, "head_dim", "an even number: rotary positions turn pairs"),
            (bool(self.windows) and set(self.windows) <= set("SL"), "windows", "a word of S and L, such as 'SSSL'"),
            (0 < self.short_window <= seq_len, "short_window", f"1 to {seq_len}, the length of a row"),
            (seq_len % BLOCK == 0 or not on_gpu, "seq_len", f"a multiple of {BLOCK}, as a profile's rows are"),
            (self.dim >= GATE_CHANNELS, "heads", f"such that the width is GATE_CHANNELS, {GATE_CHANNELS}, or more"),
            (self.batch_tokens == whole, "batch_tokens", f"{whole} or {whole + unit}: whole rows of {seq_len} a rank"),
            (min(self.rows, rows) in fit, "rows", f"one of {fit}: a step has {rows} rows a rank"),
        ]  # fmt: skip
        for holds, name, works in rules:
            if not holds:
                raise ValueError(f"{self.names[name]} is {getattr(self, name)!r}; it can be {works}")


def recipe_for(device: torch.device, vocab_size: int) -> Recipe:
    names, dtype = {}, torch.bfloat16 if device.type == "cuda" else torch.float32
    for prefix in ("CPU_",) if device.type == "cpu" else ("GPU_", "SPEEDRUN_")[: 2 if vocab_size > 2**15 else 1]:
        names |= {name.removeprefix(prefix).lower(): name for name in globals() if name.startswith(prefix)}
    return Recipe(names=names, dtype=dtype, **{key: globals()[name] for key, name in names.items()})


# ---- Kernels for a GPU. What each computes stands in plain torch where it is called: that is what a CPU runs --------

BLOCK = 64  # queries, and keys, that a program of sliding attention takes at a time
LOG2_E = tl.constexpr(1.4426950408889634)


def operator(fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Any]:
    """Registers a function as an operator that a compiler takes as it is; `fake` makes outputs of the right shape."""

    def register(function: Callable[..., Any]) -> Any:
        op = torch.library.custom_op(f"nightshift::{function.__name__}", function, mutates_args=())
        op.register_fake(fake)
        return op

    return register


def keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """For the backward pass: all tensors that went in and came out, and the last input."""
    tensors = (*inputs, *output) if isinstance(output, tuple) else (*inputs, output)
    ctx.save_for_backward(*[x for x in tensors if isinstance(x, Tensor)])
    ctx.last = inputs[-1]


@triton.jit
def heads_kernel(
    qkv, other, out, cos, sin, rows, T, eps, H: tl.constexpr, D: tl.constexpr, ADD: tl.constexpr, BACK: tl.constexpr
):
    """16 of the heads of qkv [B, T, 3, H, D]: q and k are normed and turned, v gets `other` [B, T, H, D] added.

    Backward, `other` is the gradient of what came out, and `out` takes that of what went in.
    """
    row, half = tl.program_id(0) * 16 + tl.arange(0, 16)[:, None], tl.arange(0, D // 2)[None, :]
    token, slot, inside = row // (3 * H), row % (3 * H), row < rows
    is_v, at = slot >= 2 * H, row.to(tl.int64) * D + half
    angle = token % T * (D // 2) + half
    c, s = tl.load(cos + angle, inside), tl.load(sin + angle, inside)
    a, b = tl.load(qkv + at, inside, 0).to(tl.float32), tl.load(qkv + at + D // 2, inside, 0).to(tl.float32)
    inverse = tl.rsqrt(tl.sum(a * a + b * b, 1, keep_dims=True) / D + eps)
    if BACK:
        da, db = tl.load(other + at, inside, 0).to(tl.float32), tl.load(other + at + D // 2, inside, 0).to(tl.float32)
        back_a, back_b = da * c - db * s, db * c + da * s
        along = tl.sum(back_a * a + back_b * b, 1, keep_dims=True) * inverse * inverse / D
        a, b = tl.where(is_v, da, (back_a - a * along) * inverse), tl.where(is_v, db, (back_b - b * along) * inverse)
    else:
        turned_a, turned_b = (a * c + b * s) * inverse, (b * c - a * s) * inverse
        if ADD:
            v = other + (token.to(tl.int64) * H + slot - 2 * H) * D + half
            a, b = a + tl.load(v, inside & is_v, 0), b + tl.load(v + D // 2, inside & is_v, 0)
        a, b = tl.where(is_v, a, turned_a), tl.where(is_v, b, turned_b)
    tl.store(out + at, a, inside)
    tl.store(out + at + D // 2, b, inside)


@operator(lambda qkv, other, cos, sin, back: qkv.new_empty(qkv.shape))
def heads(qkv: Tensor, other: Tensor | None, cos: Tensor, sin: Tensor, back: bool) -> Tensor:
    (_, T, _, H, D), out, rows = qkv.shape, qkv.new_empty(qkv.shape), qkv.numel() // qkv.size(-1)
    given, add = qkv if other is None else other.contiguous(), other is not None
    sizes = rows, T, EPS, H, D, add, back
    heads_kernel[triton.cdiv(rows, 16),](qkv.contiguous(), given, out, cos, sin, *sizes, num_warps=8)
    return out


def heads_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    qkv, *other, cos, sin, _ = ctx.saved_tensors
    return heads(qkv, grad, cos, sin, True), grad[:, :, 2] if other else None, None, None, None


heads.register_autograd(heads_backward, setup_context=keep)


@triton.jit
def unseen(s, back, least, BLOCK: tl.constexpr, WINDOW: tl.constexpr, INSTEAD: tl.constexpr):
    """s, with INSTEAD where a key is not one of its query's last WINDOW: it is `back` behind, at the least `least`."""
    if (least < 0) | (least + 2 * BLOCK - 2 >= WINDOW):
        s = tl.where((back >= 0) & (back < WINDOW), s, INSTEAD)
    return s


@triton.jit
def sliding_kernel(qkv, o, lse, T, H, D: tl.constexpr, WINDOW: tl.constexpr, BLOCK: tl.constexpr):
    """Of BLOCK queries of a head: attention's output, and log2 of the softmax's denominator, by a running softmax."""
    start, h, row = tl.program_id(0) * BLOCK, tl.program_id(1), tl.program_id(2) * T
    i, j = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    query, out = qkv.load([row + start, h * D]), tl.zeros([BLOCK, D], tl.float32)
    top, total = tl.full([BLOCK], -1e30, tl.float32), tl.zeros([BLOCK], tl.float32)
    for at in tl.range(tl.maximum(start + 1 - WINDOW, 0) // BLOCK * BLOCK, start + BLOCK, BLOCK):
        s = tl.dot(query, qkv.load([row + at, (H + h) * D]).T) * (LOG2_E * D**-0.5)
        s = unseen(s, start + i - at - j, start - at - BLOCK + 1, BLOCK, WINDOW, float("-inf"))
        higher = tl.maximum(top, tl.max(s, 1))
        fade, p = tl.exp2(top - higher), tl.exp2(s - higher[:, None])
        value = qkv.load([row + at, (2 * H + h) * D])
        out = tl.dot(p.to(value.dtype), value, out * fade[:, None])
        top, total = higher, total * fade + tl.sum(p, 1)
    o.store([row + start, h * D], (out / total[:, None]).to(query.dtype))
    tl.store(lse + (tl.program_id(2) * H + h) * T + start + tl.arange(0, BLOCK), top + tl.log2(total))


@triton.jit
def sliding_query_kernel(qkv, o, do, lse, delta, out, T, H, D: tl.constexpr, WINDOW: tl.constexpr, BLOCK: tl.constexpr):
    """The gradient of BLOCK queries, and their delta = sum(o * do)."""
    start, h, row = tl.program_id(0) * BLOCK, tl.program_id(1), tl.program_id(2) * T
    i, j = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    query, dout = qkv.load([row + start, h * D]), do.load([row + start, h * D])
    at_row = (tl.program_id(2) * H + h) * T + start + i
    shift = tl.sum(o.load([row + start, h * D]).to(tl.float32) * dout.to(tl.float32), 1, keep_dims=True)
    tl.store(delta + at_row, shift)
    level, grad = tl.load(lse + at_row), tl.zeros([BLOCK, D], tl.float32)
    for at in tl.range(tl.maximum(start + 1 - WINDOW, 0) // BLOCK * BLOCK, start + BLOCK, BLOCK):
        key = qkv.load([row + at, (H + h) * D])
        p = tl.exp2(tl.dot(query, key.T) * (LOG2_E * D**-0.5) - level)
        p = unseen(p, start + i - at - j, start - at - BLOCK + 1, BLOCK, WINDOW, 0.0)
        ds = p * (tl.dot(dout, qkv.load([row + at, (2 * H + h) * D]).T) - shift)
        grad = tl.dot(ds.to(key.dtype), key, grad)
    out.store([row + start, h * D], (grad * D**-0.5).to(query.dtype))


@triton.jit
def sliding_key_kernel(qkv, do, lse, delta, out, T, H, D: tl.constexpr, WINDOW: tl.constexpr, BLOCK: tl.constexpr):
    """The gradients of BLOCK keys and values. Scores are transposed: p and ds stay in registers for their products."""
    start, h, row = tl.program_id(0) * BLOCK, tl.program_id(1), tl.program_id(2) * T
    i, j = tl.arange(0, BLOCK)[None, :], tl.arange(0, BLOCK)[:, None]
    key, value = qkv.load([row + start, (H + h) * D]), qkv.load([row + start, (2 * H + h) * D])
    dkey, dvalue = tl.zeros([BLOCK, D], tl.float32), tl.zeros([BLOCK, D], tl.float32)
    for at in tl.range(start, tl.minimum(start + BLOCK + WINDOW - 1, T), BLOCK):
        query, dout = qkv.load([row + at, h * D]), do.load([row + at, h * D])
        at_row = (tl.program_id(2) * H + h) * T + at + i
        s, dp = tl.dot(key, query.T), tl.dot(value, dout.T)  # both first: what follows overlaps the second
        p = tl.exp2(s * (LOG2_E * D**-0.5) - tl.load(lse + at_row))
        p = unseen(p, at + i - start - j, at - start - BLOCK + 1, BLOCK, WINDOW, 0.0)
        dvalue = tl.dot(p.to(dout.dtype), dout, dvalue)
        dkey = tl.dot((p * (dp - tl.load(delta + at_row))).to(query.dtype), query, dkey)
    out.store([row + start, (H + h) * D], (dkey * D**-0.5).to(key.dtype))
    out.store([row + start, (2 * H + h) * D], dvalue.to(key.dtype))


def tiles(x: Tensor) -> TensorDescriptor:
    """Heads [B, T, ..., D] as a matrix [B * T, ...], to be read in tiles of BLOCK positions of one head."""
    return TensorDescriptor.from_tensor(x.contiguous().flatten(0, 1).flatten(1), [BLOCK, x.size(-1)])


@operator(lambda qkv, window: (torch.empty_like(qkv[:, :, 0]), torch.empty_like(qkv[:, :, 0, :, 0].float())))
def sliding(qkv: Tensor, window: int) -> tuple[Tensor, Tensor]:
    (B, T, _, H, D), o = qkv.shape, torch.empty_like(qkv[:, :, 0])
    lse = o.new_empty(B, T, H, dtype=torch.float32)  # its memory in the order B, H, T
    sliding_kernel[T // BLOCK, H, B](tiles(qkv), tiles(o), lse, T, H, D, window, BLOCK, num_warps=4, num_stages=1)
    return o, lse


@operator(lambda do, qkv, o, lse, window: qkv.new_empty(qkv.shape))
def sliding_gradient(do: Tensor, qkv: Tensor, o: Tensor, lse: Tensor, window: int) -> Tensor:
    (B, T, _, H, D), delta, out = qkv.shape, torch.empty_like(lse), qkv.new_empty(qkv.shape)
    given, grad, result = tiles(qkv), tiles(do), tiles(out)
    sizes, grid = (T, H, D, window, BLOCK), (T // BLOCK, H, B)
    sliding_query_kernel[grid](given, tiles(o), grad, lse, delta, result, *sizes, num_warps=4, num_stages=1)
    sliding_key_kernel[grid](given, grad, lse, delta, result, *sizes, num_warps=4, num_stages=2)
    return out


sliding.register_autograd(
    lambda ctx, do, _: (sliding_gradient(do, *ctx.saved_tensors, ctx.last), None), setup_context=keep
)


@triton.jit
def relu_squared_kernel(
    x, w, act, out, M, N, K, BACK: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr
):
    """out [M, N] = relu(x @ w.T)², w [N, K]; backward (x @ w) * 2 sqrt(act), w [K, N]. x is [M, K], act [M, N]."""
    across = tl.cdiv(N, BN)
    for tile in tl.range(tl.program_id(0), tl.cdiv(M, BM) * across, tl.num_programs(0)):
        m, n, acc = tile // across * BM, tile % across * BN, tl.zeros([BM, BN], tl.float32)
        for k in range(0, K, BK):
            acc = tl.dot(x.load([m, k]), w.load([k, n]) if BACK else w.load([n, k]).T, acc)
        if BACK:
            acc *= 2 * tl.sqrt(act.load([m, n]).to(tl.float32))
        else:
            acc = tl.maximum(acc, 0)
            acc *= acc
        out.store([m, n], acc.to(out.dtype))


def relu_squared(x: Tensor, w: Tensor, act: Tensor | None = None) -> Tensor:
    """relu(x @ w.T)²; given what that was as `act`, and the gradient x behind a linear w, the one before the relu."""
    back, (m, k), n = act is not None, x.shape, w.size(0) if act is None else w.size(1)
    size, out, describe = (128, 256, 64), x.new_empty(m, n), TensorDescriptor.from_tensor
    blocks = [size[::2], (size[2], size[1]) if back else size[1:], size[:2], size[:2]]
    described = [describe(t, [*b]) for t, b in zip((x, w, out if act is None else act, out), blocks, strict=True)]
    programs = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 4
    relu_squared_kernel[programs,](*described, m, n, k, back, *size, num_warps=8, num_stages=3)
    return out


@operator(lambda x, up, down: (torch.empty_like(x), x @ up.T))
def mlp(x: Tensor, up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    act = relu_squared(x, up)
    return act @ down.T, act


@operator(lambda grad, *given: [torch.empty_like(x) for x in given[:3]])
def mlp_gradient(grad: Tensor, x: Tensor, up: Tensor, down: Tensor, y: Tensor, act: Tensor) -> list[Tensor]:
    grad = grad.contiguous()
    hidden = relu_squared(grad, down, act)
    return [hidden @ up, hidden.T @ x, grad.T @ act]


mlp.register_autograd(lambda ctx, grad, _: tuple(mlp_gradient(grad, *ctx.saved_tensors)), setup_context=keep)


@triton.jit
def loss_kernel(logits, targets, losses, width, vocab, cap, CHUNKS: tl.constexpr, CHUNK: tl.constexpr):
    """One row of logits / cap: its loss, and in its own place the gradient. Within ±cap no maximum is needed."""
    row, total = tl.program_id(0).to(tl.int64), tl.zeros([CHUNK], tl.float32)
    logits += row * width
    target = tl.load(targets + row)
    for chunk in tl.static_range(CHUNKS):
        col = chunk * CHUNK + tl.arange(0, CHUNK)
        tanh = 2 * tl.sigmoid(2 * tl.load(logits + col, col < vocab, 0).to(tl.float32)) - 1
        total += tl.where(col < vocab, tl.exp(cap * tanh - cap), 0)
    truth, summed = 2 * tl.sigmoid(2 * tl.load(logits + target).to(tl.float32)) - 1, tl.sum(total)
    tl.store(losses + row, tl.log(summed) + cap - cap * truth)
    for chunk in tl.static_range(CHUNKS):
        col = chunk * CHUNK + tl.arange(0, CHUNK)
        tanh = 2 * tl.sigmoid(2 * tl.load(logits + col, col < vocab, 0).to(tl.float32)) - 1
        error = tl.exp(cap * tanh - cap) / summed - tl.where(col == target, 1.0, 0.0)
        tl.store(logits + col, tl.where(col < vocab, cap * (1 - tanh * tanh) * error, 0), col < width)


class SoftCappedLoss(torch.autograd.Function):
    """soft_capped_loss of x [N, D] / cap: the logits become their own gradient as soon as they are read."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, head: Tensor, targets: Tensor, vocab_size: int) -> Tensor:
        logits, losses = x @ head.T, torch.empty(targets.shape, device=x.device)
        chunk = min(4096, triton.next_power_of_2(logits.size(1)))
        sizes = logits.size(1), vocab_size, SOFTCAP, triton.cdiv(logits.size(1), chunk), chunk
        loss_kernel[targets.numel(),](logits, targets, losses, *sizes, num_warps=8)
        ctx.save_for_backward(x, head, logits)
        return losses.mean()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, head, dlogits = ctx.saved_tensors
        scale = (grad / x.size(0)).to(x.dtype)
        return dlogits @ head * scale, dlogits.T @ x * scale, None, None


# ---- Model ----------------------------------------------------------------------------------------------------------

Pair = tuple[Tensor, Tensor]
FULL_KERNELS = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.size(-1),), eps=EPS)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """Multiplies in the activations' precision; the float32 weight is cast on use."""
    return F.linear(x, weight.to(x.dtype))


def finish_heads(qkv: Tensor, extra: Tensor | None, angles: Pair) -> Tensor:
    """Heads [B, T, 3, H, D], of which q and k are normed and turned, and v gets `extra` [B, T, H, D] added.

    Rotary position embedding (Su et al., arXiv 2104.09864); dimension i pairs with i + D / 2.
    """
    if qkv.is_cuda:
        return heads(qkv, extra, *angles, False)
    cos, sin = (x[:, None, None] for x in angles)
    a, b = norm(qkv[:, :, :2]).chunk(2, dim=-1)
    v = qkv[:, :, 2] if extra is None else qkv[:, :, 2] + extra
    return torch.cat((torch.cat((a * cos + b * sin, b * cos - a * sin), dim=-1), v.unsqueeze(2)), dim=2)


def attend(qkv: Tensor, window: int) -> Tensor:
    """Causal attention to the last `window` positions: heads [B, T, 3, H, D] -> [B, T, H, D]."""
    seq_len = qkv.size(1)
    if window < seq_len and qkv.is_cuda and seq_len % BLOCK == 0:
        return sliding(qkv, window)[0]
    mask, (q, k, v) = None, (x.transpose(1, 2) for x in qkv.unbind(2))
    if window < seq_len:
        mask = torch.ones(seq_len, seq_len, dtype=torch.bool, device=qkv.device).tril().triu(1 - window)
    with sdpa_kernel(FULL_KERNELS, set_priority=True):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None).transpose(1, 2)


def soft_capped_loss(x: Tensor, head: Tensor, targets: Tensor, vocab_size: int) -> Tensor:
    """Mean nats per token, from x [B, T, D]; logits are SOFTCAP * tanh(x @ head.T / SOFTCAP)."""
    x, targets = (x / SOFTCAP).flatten(0, 1), targets.flatten()  # divided where it is narrow
    if x.is_cuda:
        return SoftCappedLoss.apply(x, head.to(x.dtype), targets, vocab_size)
    return F.cross_entropy(SOFTCAP * torch.tanh(F.linear(x, head)[:, :vocab_size]), targets)


class Layer(nn.Module):
    """Attention and an MLP with ReLU² (So et al., arXiv 2109.08668). It is what is compiled: once for most layers."""

    def __init__(self, recipe: Recipe, layer: int) -> None:
        super().__init__()
        dim, hidden, bound = recipe.dim, recipe.mlp_ratio * recipe.dim, INIT_SCALE * math.sqrt(3 / recipe.dim)
        self.heads, self.window = recipe.heads, recipe.short_window if recipe.slides(layer) else 2**31
        self.qkv = nn.Parameter(torch.empty(3, dim, dim).uniform_(-bound, bound))  # three matrices to Muon
        self.out = nn.Parameter(torch.zeros(dim, dim))
        if recipe.has_value_embedding(layer):
            self.gate = nn.Parameter(torch.zeros(recipe.heads, GATE_CHANNELS))
        self.up = nn.Parameter(torch.empty(hidden, dim).uniform_(-bound, bound))
        self.down = nn.Parameter(torch.zeros(dim, hidden))

    def forward(self, x: Tensor, x0: Tensor, mix: Pair, tokens: Tensor, values: Tensor | None, angles: Pair) -> Tensor:
        """x, x0 [B, T, D]; mix: scales of the stream and of x0; values [V, D]: its value embedding, if any."""
        x = mix[0] * x + mix[1] * x0
        x = x + self.attention(norm(x), None if values is None else F.embedding(tokens, values).to(x.dtype), angles)
        y = norm(x)
        if x.is_cuda:
            return x + mlp(y.flatten(0, 1), self.up.to(y.dtype), self.down.to(y.dtype))[0].view_as(x)
        return x + linear(F.relu(linear(y, self.up)).square(), self.down)

    def attention(self, x: Tensor, value: Tensor | None, angles: Pair) -> Tensor:
        """x [B, T, D]; value [B, T, D]: what of the value embedding is at these tokens."""
        qkv = linear(x, self.qkv.flatten(0, 1)).unflatten(-1, (3, self.heads, -1))  # [B, T, 3, H, head_dim]
        if value is not None:
            gate = 2 * torch.sigmoid(linear(x[..., :GATE_CHANNELS], self.gate))  # [B, T, H], 1 at the start
            value = gate.unsqueeze(-1) * value.unflatten(-1, (self.heads, -1))
        return linear(attend(finish_heads(qkv, value, angles), self.window).flatten(2), self.out)


class GPT(nn.Module):
    """Tokens int64 [B, T] -> logits float32 [B, T, V]."""

    def __init__(self, recipe: Recipe, vocab_size: int) -> None:
        super().__init__()
        self.recipe, self.vocab_size = recipe, vocab_size
        padded = 64 * math.ceil(vocab_size / 64)  # GEMMs want a round width, and ranks whole shares
        bound = INIT_SCALE * math.sqrt(3 / recipe.dim)
        self.embed = nn.Parameter(torch.randn(padded, recipe.dim))
        self.ngrams = nn.Parameter(torch.zeros(len(NGRAMS) * recipe.ngram_rows, recipe.dim), requires_grad=False)
        self.met: list[Pair] = []  # of n-grams since the last step: ids [B, T, n], what was looked up [B, T, D]
        self.values = nn.ParameterDict()
        for layer in filter(recipe.has_value_embedding, range(recipe.depth)):
            self.values[str(layer)] = nn.Parameter(torch.empty(padded, recipe.dim).uniform_(-bound, bound))
        self.layers = nn.ModuleList(Layer(recipe, layer) for layer in range(recipe.depth))
        self.head = nn.Parameter(0.001 * torch.randn(padded, recipe.dim))
        self.resid_scale = nn.Parameter(torch.ones(recipe.depth))  # of the stream as it enters a layer
        self.x0_scale = nn.Parameter(torch.full((recipe.depth,), X0_INIT))  # of the embedding, mixed in again
        self._angles: dict[int, Pair] = {}

    def angles(self, seq_len: int) -> Pair:
        """Cos and sin of rotary positions, float32 [T, head_dim / 2]; the same tensors each time."""
        if seq_len not in self._angles:
            half = torch.arange(self.recipe.head_dim // 2, device=self.embed.device) * (2 / self.recipe.head_dim)
            angle = torch.outer(torch.arange(seq_len, device=half.device), self.recipe.rope_base**-half)
            self._angles[seq_len] = angle.cos(), angle.sin()
        return self._angles[seq_len]

    def look_up(self, tokens: Tensor) -> Pair:
        """Hashed n-grams: ids int64 [B, T, n], of one table after the other, and the sum of their rows [B, T, D]."""
        ids, key = [], tokens
        for back in range(1, max(NGRAMS)):
            key = key * 1_000_003 + F.pad(tokens, (back, 0))[:, : tokens.size(1)] + 1
            if back + 1 in NGRAMS:
                ids.append((key ^ (key >> 17)) % self.recipe.ngram_rows + len(ids) * self.recipe.ngram_rows)
        rows = torch.stack(ids, dim=-1)
        return rows, F.embedding(rows, self.ngrams).sum(2).to(self.recipe.dtype)

    def first(self, tokens: Tensor, looked_up: Tensor) -> Tensor:
        """What enters the first layer."""
        return norm(F.embedding(tokens, self.embed).to(looked_up.dtype) + looked_up)

    def stream(self, tokens: Tensor) -> Tensor:
        """What the last layer leaves, normed: [B, T, D]."""
        angles = self.angles(tokens.size(1))
        ids, looked_up = self.look_up(tokens)
        if torch.is_grad_enabled():  # a leaf to autograd: its gradient is that of each row it was summed from
            self.met.append((ids, looked_up.requires_grad_()))
        x = x0 = self.first(tokens, looked_up)
        scales = zip(self.resid_scale.unbind(), self.x0_scale.unbind(), strict=True)
        for number, (layer, pair) in enumerate(zip(self.layers, scales, strict=True)):
            x = layer(x, x0, pair, tokens, self.values.get(str(number)), angles)
        return norm(x)

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Mean nats per token of a batch."""
        return soft_capped_loss(self.stream(tokens), self.head, targets, self.vocab_size)

    def forward(self, tokens: Tensor) -> Tensor:
        logits = linear(self.stream(tokens) / SOFTCAP, self.head)[..., : self.vocab_size]
        return SOFTCAP * torch.tanh(logits.float())

    def round_weights(self) -> None:
        """To the precision that they are multiplied in, which changes no logit and halves the file."""
        for p in filter(lambda p: p.dim() > 1, self.parameters()):
            p.data = p.detach().to(self.recipe.dtype, copy=True)  # its own memory, no view of a stack


def load(weights: Path, device: torch.device | str) -> nn.Module:
    """The trained model, for scoring. Its vocabulary, padded, is read off the embedding; the rest is this file's."""
    state, device = load_file(weights, device=str(device)), torch.device(device)
    with device:
        model = GPT(recipe_for(device, len(state["embed"])), len(state["embed"]))
    model.load_state_dict(state)
    return model.eval()


# ---- Optimiser ------------------------------------------------------------------------------------------------------

# Polar Express (Amsel et al., arXiv 2505.16932): the best odd quintics a·x + b·x³ + c·x⁵, one a step, for singular
# values from 1e-3 to 1, with the paper's safety factor of 1.02 in all but the last.
POLAR_EXPRESS = [
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
]


def polar_express(matrices: Tensor) -> Tensor:
    """The nearest orthogonal matrix to each of [K, m, n]: U·Vᵀ of its SVD, singular values to within about 15% of 1."""
    x = matrices.bfloat16() if matrices.is_cuda else matrices
    if tall := x.size(-2) > x.size(-1):
        x = x.mT
    x = x / (1.02 * x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for a, b, c in POLAR_EXPRESS[:POLAR_STEPS]:
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


def muon_update(
    weight: Tensor, grad: Tensor, momentum_buffer: Tensor, variance: Tensor, lr: Tensor, momentum: Tensor, decay: Tensor
) -> None:
    """One Muon step in place on K matrices at once: weight, grad, momentum_buffer [K, m, n], variance [K, m or n].

    Nesterov momentum, orthogonalised (Jordan et al., 2024); each row of a wide matrix, column of a tall one, scaled
    by its running variance at unchanged norm (NorMuon, arXiv 2510.05491); weight decay only where it goes along with
    the update (cautious weight decay, arXiv 2510.12402).
    """
    momentum_buffer.mul_(momentum).add_(grad * (1 - momentum))
    update = polar_express(grad * (1 - momentum) + momentum_buffer * momentum).float()
    m, n = weight.shape[-2:]
    square = update.square().mean(dim=-1 if m <= n else -2, keepdim=True)
    variance.mul_(MUON_BETA2).add_(square * (1 - MUON_BETA2))
    scale = variance.clamp_min(1e-10).rsqrt()
    before = square.sum(dim=(-2, -1), keepdim=True)
    after = (square * scale.square()).sum(dim=(-2, -1), keepdim=True)
    update = update * (scale * (before / after.clamp_min(1e-10)).sqrt())
    weight.sub_(lr * math.sqrt(max(1, m / n)) * (update + decay * weight * (update * weight >= 0)))


def update_rows(table: Tensor, total: Tensor, moment: Tensor, count: Tensor, ids: Tensor, lr: Tensor) -> None:
    """RMSprop, one second moment a row, on the rows of table [R, D] that ids [N] names; zeroes their gradients, total.

    A row named twice is written twice, with one value: nothing need be sorted, nor waited for.
    """
    grad, seen, mean = total[ids], count[ids] + 1, moment[ids]
    mean = mean + (grad.square().mean(1) - mean) * (1 / seen).clamp_min(1 - ADAM_BETAS[1])
    after = table[ids] - lr * grad * (mean + 1e-30).rsqrt().unsqueeze(1)
    table[ids], moment[ids], count[ids], total[ids] = after, mean, seen, torch.zeros_like(after)


def share(x: Tensor) -> Tensor:
    """This rank's part of the rows of x: a view."""
    return x.chunk(dist.get_world_size())[dist.get_rank()] if dist.is_initialized() else x


def summed(x: Tensor) -> Callable[[], Tensor]:
    """Starts to sum x over the ranks; call what it returns for this rank's share of the sum."""
    if not dist.is_initialized():
        return lambda: x
    part = torch.empty_like(share(x))
    work = dist.reduce_scatter_tensor(part, x, async_op=True)
    return lambda: (work.wait(), part)[1]


def spread(x: Tensor) -> Any:
    """Starts to give every rank all ranks' shares of x; the work to wait for, if any."""
    return dist.all_gather_into_tensor(x, share(x).clone(), async_op=True) if dist.is_initialized() else None


def all_ranks(x: Tensor) -> Tensor:
    """x [n, ...] of every rank, one after the other."""
    return torch.cat(all_gather(x)) if dist.is_initialized() else x


class Stack:
    """Parameters whose matrices have one shape, as [K, m, n] with zeros up to whole shares; they become views of it.

    A [3, m, n] parameter counts as three matrices.
    """

    def __init__(self, params: list[nn.Parameter]) -> None:
        self.params, (m, n) = params, params[0].shape[-2:]
        counts = [p.numel() // (m * n) for p in params]
        self.missing = -sum(counts) % (dist.get_world_size() if dist.is_initialized() else 1)
        self.weights = self.filled([p.detach() for p in params])
        for p, part in zip(params, self.weights.split([*counts, self.missing]), strict=False):
            p.data = part.view(p.shape)
        self.momentum_buffer = torch.zeros_like(share(self.weights))
        self.variance = torch.zeros_like(self.momentum_buffer.mean(-1 if m <= n else -2, keepdim=True))

    def filled(self, tensors: list[Tensor]) -> Tensor:
        m, n = tensors[0].shape[-2:]
        return torch.cat([t.view(-1, m, n) for t in tensors] + [tensors[0].new_zeros(self.missing, m, n)])


class Optimizer:
    """Muon for the matrices of the layers, AdamW for embeddings, head and scalars, RMSprop by rows for the n-grams.

    A rank updates, and holds the state of, its share of matrices and tables; scalars and n-grams are everybody's.
    """

    def __init__(self, model: GPT) -> None:
        recipe, device = model.recipe, model.embed.device
        width = (recipe.dim / 768) ** -0.5  # AdamW's learning rates are stated for a width of 768
        self.tables = [model.head, *model.values.values(), model.embed]
        head, *values, embed = self.shares = [nn.Parameter(share(p.detach())) for p in self.tables]
        self.scalars = [model.resid_scale, model.x0_scale]
        groups: list[dict[str, Any]] = [
            {"params": [embed], "lr": recipe.embedding_lr * width},
            {"params": values, "lr": recipe.embedding_lr * width, "weight_decay": VALUE_WEIGHT_DECAY},
            {"params": [head], "lr": recipe.head_lr * width},
            {"params": [model.resid_scale], "lr": 0.01 * SCALAR_LR},
            {"params": [model.x0_scale], "lr": SCALAR_LR, "betas": X0_BETAS},
        ]
        self.adamw = torch.optim.AdamW(groups, betas=ADAM_BETAS, eps=1e-10, weight_decay=0.0, fused=True)
        self.base_lrs = [group["lr"] for group in self.adamw.param_groups]
        by_shape: dict[torch.Size, list[nn.Parameter]] = {}
        for p in model.layers.parameters():
            by_shape.setdefault(p.shape[-2:], []).append(p)
        self.stacks, self.matrix_lr = [Stack(params) for params in by_shape.values()], recipe.matrix_lr
        self.model, rows = model, len(model.ngrams)
        self.total = torch.zeros_like(model.ngrams)  # of the gradients of each row; zeros between steps
        self.moment, self.count = (torch.zeros(rows, device=device) for _ in range(2))
        self.settings = [torch.zeros((), device=device) for _ in range(4)]  # a compiler would build numbers in
        compiled = partial(torch.compile, dynamic=False) if device.type == "cuda" else lambda function: function
        self.muon_update, self.update_rows = compiled(muon_update), compiled(update_rows)

    @torch.no_grad()
    def step(self, progress: float) -> None:
        """Takes a step with the gradients that the parameters hold, summed over the ranks, and drops them."""
        scale, momentum, decay = schedule(progress)
        values = self.matrix_lr * scale, momentum, decay, NGRAM_LR * scale
        for tensor, value in zip(self.settings, values, strict=True):
            tensor.fill_(value)
        tables = [summed(p.grad) for p in self.tables]
        stacks = [summed(stack.filled([p.grad for p in stack.params])) for stack in self.stacks]
        if dist.is_initialized():
            for p in self.scalars:
                dist.all_reduce(p.grad)
        self.step_rows()
        for group, lr in zip(self.adamw.param_groups, self.base_lrs, strict=True):
            group["lr"] = lr * scale
        for p, total in zip(self.shares, tables, strict=True):
            p.grad = total()
        self.adamw.step()
        works = [spread(p.detach()) for p in self.tables]
        for stack, total in zip(self.stacks, stacks, strict=True):
            state = stack.momentum_buffer, stack.variance
            self.muon_update(share(stack.weights), total(), *state, *self.settings[:3])
            works.append(spread(stack.weights))
        for work in filter(None, works):
            work.wait()
        self.model.zero_grad()

    def step_rows(self) -> None:
        """Of the n-grams, on all ranks' gradients: every rank does the same."""
        met, self.model.met = self.model.met, []
        ids = all_ranks(torch.cat([ids.flatten(0, 1) for ids, _ in met]))  # [N, n]
        grads = all_ranks(torch.cat([x.grad.flatten(0, 1) for _, x in met])).to(self.total.dtype)  # [N, D]
        for column in ids.unbind(1):
            self.total.index_add_(0, column, grads)
        self.update_rows(self.model.ngrams, self.total, self.moment, self.count, ids.flatten(), self.settings[3])

    def reset(self) -> None:
        """Forgets all steps taken."""
        self.adamw.state.clear()
        for state in [self.moment, self.count, *(t for s in self.stacks for t in (s.momentum_buffer, s.variance))]:
            state.zero_()


def schedule(progress: float) -> tuple[float, float, float]:
    """From progress in [0, 1]: the scale of the learning rates, Muon's momentum, its weight decay."""
    left = min(1.0, (1 - progress) / WARMDOWN) if WARMDOWN else 1.0
    momentum = MUON_MOMENTUM_START + min(1.0, progress / MUON_MOMENTUM_WARMUP) * (MUON_MOMENTUM - MUON_MOMENTUM_START)
    return left + (1 - left) * FINAL_LR, momentum, WEIGHT_DECAY * (1 - progress)


# ---- The run --------------------------------------------------------------------------------------------------------


class Trainer:
    """One rank's share of training: micro-batches in, now and then a step."""

    def __init__(self, run: prepare.OpenRun, recipe: Recipe) -> None:
        self.run, self.seq_len = run, min(recipe.seq_len, run.seq_len)
        recipe.check(self.seq_len, run.world_size)
        rows = recipe.batch_tokens // (self.seq_len * run.world_size)  # of a step, on this rank
        self.rows, self.accumulate = min(recipe.rows, rows), max(1, rows // recipe.rows)
        with run.device:
            self.model = GPT(recipe, run.vocab_size)
        spans = sum(min(layer.window, self.seq_len) for layer in self.model.layers)
        matrices = sum(p.numel() for p in (self.model.head, *self.model.layers.parameters()))
        self.model.flops_per_token = 6.0 * matrices + 12 * recipe.dim * spans  # PaLM, arXiv 2204.02311, app. B
        self.optimizer = Optimizer(self.model)
        if run.device.type == "cuda":
            for part in self.model.layers:
                part.compile(dynamic=False)
            self.model.first = torch.compile(self.model.first, dynamic=False)
            self.model.look_up = torch.compile(self.model.look_up, dynamic=False)

    def accumulate_gradients(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Forward and backward of one micro-batch, int64 [rows, T]; its loss."""
        loss = self.model.loss(inputs, targets)
        (loss / (self.accumulate * self.run.world_size)).backward()
        return loss.detach()

    def warm_up(self) -> None:
        """Compiles and touches everything off the clock, on random tokens, then puts all back as it was."""
        saved = {name: t.clone() for name, t in self.model.state_dict().items()}
        with torch.random.fork_rng(devices=[self.run.device] if self.run.device.type == "cuda" else []):
            for _ in range(2):
                self.accumulate_gradients(*self.run.dummy_batch(self.rows, self.seq_len))
                self.optimizer.step(0.0)
        self.model.load_state_dict(saved)
        self.optimizer.reset()
        gc.disable()  # a collection would stall the queue of the GPU

    def train(self) -> None:
        """Until the budget is used."""
        for count, (inputs, targets) in enumerate(self.run.batches(self.rows, self.seq_len, self.accumulate), 1):
            loss = self.accumulate_gradients(inputs, targets)
            if count % self.accumulate == 0:
                self.optimizer.step(self.run.progress())
                self.run.log(count // self.accumulate - 1, loss)


def main() -> None:
    run = prepare.open_run(total_steps=TOTAL_STEPS)
    if run.world_size > 1:
        dist.init_process_group(device_id=run.device if run.device.type == "cuda" else None)
    trainer = Trainer(run, recipe_for(run.device, run.vocab_size))
    trainer.warm_up()
    trainer.train()
    trainer.model.round_weights()
    run.finish(trainer.model)
    if run.world_size > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
