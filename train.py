"""The training run: model, optimiser, schedules, loop. The one file of nightshift that proposers edit.

A decoder-only transformer of the nanochat and modded-nanogpt family: rotary positions, QK-norm, ReLU² MLP, value
embeddings with a gate per head, sliding windows, soft-capped logits; Muon for the matrices, AdamW for the rest.
A GPU trains it in bfloat16 through torch.compile, a CPU a small one eagerly in float32; several GPUs under torchrun.

The contract, in full on `nightshift.openrun.OpenRun`:

    main()                  trains: `python train.py`, or torchrun on every rank
    load(weights, device)   rebuilds the trained model: tokens int64 [B, T] -> logits float32 [B, T, V]

Compiling and warming up happen before the first batch, off the clock; every second after it counts. The seed is
the run's: setting one here would hide the noise that scores are judged against.

Claim, by hand (`NIGHTSHIFT_PROFILE=local NIGHTSHIFT_BUDGET_S=100 NIGHTSHIFT_SEED=1 python train.py`): on one NVIDIA
H200, torch 2.11.0+cu130, 503 MB of Python source and books, vocabulary 8192: 100 s reach 1.1379 and 1.1338 validation
bits per byte (seeds 1 and 2), 0.83 epochs, 837 and 841 steps, 38% of the bfloat16 peak.

A constant marked `# knob: log 0.01 0.16` (or lin, int, choice) is one that the knobs proposer may turn within that
range; `# knob[cpu]:` and `# knob[cuda]:` are turned only where that device trains.
"""

from __future__ import annotations

import gc
import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_model
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import prepare

if TYPE_CHECKING:
    from nightshift.openrun import OpenRun

# ---- Knobs: a GPU ---------------------------------------------------------------------------------------------------

GPU_DEPTH = 9  # knob[cuda]: int 6 12
GPU_HEADS = 5  # knob[cuda]: int 4 8
GPU_HEAD_DIM = 128
GPU_MLP_RATIO = 4  # hidden width of the MLP, in widths of the model
GPU_BATCH_TOKENS = 2**17  # of one optimiser step, over all ranks
GPU_ROWS = 64  # of a micro-batch on one rank, at most: memory decides, the result does not depend on it
GPU_SEQ_LEN = 2048  # of a training row, at most; a shorter one of the profile holds
GPU_WINDOWS = "SSSSL"  # S: the short window, L: all that came before; repeated over the layers, of which the last is L
GPU_SHORT_WINDOW = 256  # knob[cuda]: choice 128 256 512
GPU_ROPE_BASE = 200_000.0  # knob[cuda]: log 10000 1000000
GPU_MATRIX_LR = 0.04  # knob[cuda]: log 0.01 0.16
GPU_EMBEDDING_LR = 0.9  # knob[cuda]: log 0.2 3.0
GPU_HEAD_LR = 0.008  # knob[cuda]: log 0.001 0.02

# ---- Knobs: the CPU demo, some 200 steps on one core ----------------------------------------------------------------

CPU_DEPTH = 2  # knob[cpu]: int 1 3
CPU_HEADS = 1  # knob[cpu]: int 1 2
CPU_HEAD_DIM = 64
CPU_MLP_RATIO = 2  # knob[cpu]: int 1 4
CPU_BATCH_TOKENS = 1024  # knob[cpu]: choice 512 1024 2048
CPU_ROWS = 16
CPU_SEQ_LEN = 128  # half of what is scored: attention costs less, and rotary positions carry over
CPU_WINDOWS = "L"
CPU_SHORT_WINDOW = 64
CPU_ROPE_BASE = 10_000.0
CPU_MATRIX_LR = 0.08  # knob[cpu]: log 0.02 0.3
CPU_EMBEDDING_LR = 0.5  # knob[cpu]: log 0.1 2.0
CPU_HEAD_LR = 0.012  # knob[cpu]: log 0.003 0.05

# ---- Knobs: both ----------------------------------------------------------------------------------------------------

GATE_CHANNELS = 32  # of the stream, that the gates of the value embeddings read
SOFTCAP = 15.0  # knob: log 8 40
INIT_SCALE = 0.68  # knob: lin 0.3 1.2
X0_INIT = 0.05  # knob: lin 0.0 0.3
SCALAR_LR = 0.5  # knob: log 0.05 2.0
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
TOTAL_BATCHES: int | None = None  # where a time_to_target run stops; None: when the budget is used


@dataclass(frozen=True)
class Recipe:
    """What differs between a GPU and the CPU demo. A model is loaded on the kind of device that trained it."""

    prefix: str  # of its constants' names
    depth: int
    heads: int
    head_dim: int
    mlp_ratio: int
    batch_tokens: int
    rows: int
    seq_len: int
    windows: str
    short_window: int
    rope_base: float
    matrix_lr: float
    embedding_lr: float
    head_lr: float
    dtype: torch.dtype  # of activations; parameters are float32

    @property
    def dim(self) -> int:
        return self.heads * self.head_dim

    def slides(self, layer: int) -> bool:
        """Whether a layer's attention is confined to the short window."""
        return self.windows[layer % len(self.windows)] == "S" and layer < self.depth - 1

    def has_value_embedding(self, layer: int) -> bool:
        """Every second layer, the last one included."""
        return (self.depth - 1 - layer) % 2 == 0


def recipe_for(device: torch.device) -> Recipe:
    """The constants above that carry the device's prefix: GPU_DEPTH is the depth on a GPU."""
    prefix, dtype = ("GPU", torch.bfloat16) if device.type == "cuda" else ("CPU", torch.float32)
    names = [field.name for field in fields(Recipe) if field.name not in ("prefix", "dtype")]
    return Recipe(prefix=prefix, dtype=dtype, **{name: globals()[f"{prefix}_{name.upper()}"] for name in names})


def check(recipe: Recipe) -> None:
    """Raises ValueError, with the constant and the values that work, where no model can be built."""
    name = recipe.prefix
    for size in ("depth", "heads", "mlp_ratio", "seq_len", "short_window"):
        if getattr(recipe, size) < 1:
            raise ValueError(f"{name}_{size.upper()} is {getattr(recipe, size)}; it can be 1 or more")
    if recipe.dtype == torch.bfloat16 and recipe.head_dim not in (32, 64, 128):
        raise ValueError(f"{name}_HEAD_DIM is {recipe.head_dim}; the attention kernels take 32, 64 or 128")
    if recipe.head_dim % 2:
        raise ValueError(f"{name}_HEAD_DIM is {recipe.head_dim}; rotary positions turn pairs, so it must be even")
    if not recipe.windows or set(recipe.windows) - set("SL"):
        raise ValueError(f"{name}_WINDOWS is {recipe.windows!r}; it is a word of the letters S and L, such as 'SSSL'")
    if recipe.dim < GATE_CHANNELS:
        raise ValueError(f"GATE_CHANNELS is {GATE_CHANNELS}; it can be 1 to {recipe.dim}, the width of the model")
    if not 1 <= POLAR_STEPS <= len(POLAR_EXPRESS):
        raise ValueError(f"POLAR_STEPS is {POLAR_STEPS}; it can be 1 to {len(POLAR_EXPRESS)}")


def micro_batches(recipe: Recipe, seq_len: int, world_size: int) -> tuple[int, int]:
    """(rows of a micro-batch, micro-batches of a step) on each rank; together they make up BATCH_TOKENS.

    Raises ValueError, with the constant and values that work, where they cannot.
    """
    name, unit = recipe.prefix, seq_len * world_size
    if recipe.batch_tokens < unit or recipe.batch_tokens % unit:
        below = max(1, recipe.batch_tokens // unit) * unit
        raise ValueError(
            f"{name}_BATCH_TOKENS is {recipe.batch_tokens}; rows of {seq_len} tokens on {world_size} ranks "
            f"make it a multiple of {unit}, such as {below} or {below + unit}"
        )
    rows = recipe.batch_tokens // unit  # of a step, on one rank
    micro = min(recipe.rows, rows)
    if micro < 1 or rows % micro:
        fit = [r for r in range(1, rows + 1) if rows % r == 0]
        raise ValueError(f"{name}_ROWS is {recipe.rows}; a step has {rows} rows a rank, so it can be {fit}")
    return micro, rows // micro


# ---- Model ----------------------------------------------------------------------------------------------------------

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # q, k, v [B, H, T, head_dim] -> the same shape
FULL_KERNELS = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


class Frame(NamedTuple):
    """What all layers share at one sequence length: made once, outside of what is compiled."""

    cos: Tensor  # [T, 1, 1, head_dim]
    sin: Tensor  # [T, 1, 1, head_dim], the second half negated
    sliding: Attend


def norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.size(-1),))


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """Multiplies in the activations' precision; the float32 weight is cast on use."""
    return F.linear(x, weight.to(x.dtype))


def rotate(x: Tensor, frame: Frame) -> Tensor:
    """Rotary position embedding (Su et al., arXiv 2104.09864) of x [B, T, 2, H, head_dim]; i pairs with i + half."""
    a, b = x.chunk(2, dim=-1)
    return x * frame.cos + torch.cat((b, a), dim=-1) * frame.sin


def full_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(FULL_KERNELS, set_priority=True):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def sliding_mask(seq_len: int, window: int, device: torch.device) -> Tensor:
    """bool [T, T]: query i sees keys i - window + 1 ... i."""
    i = torch.arange(seq_len, device=device)
    back = i[:, None] - i[None, :]
    return (back >= 0) & (back < window)


def sliding_attention(seq_len: int, window: int, device: torch.device) -> Attend:
    """Attention to the last `window` positions: FlexAttention, which skips masked blocks, or a mask on a CPU."""
    if window >= seq_len:
        return full_attention
    if device.type == "cpu":
        return partial(F.scaled_dot_product_attention, attn_mask=sliding_mask(seq_len, window, device))

    def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (q >= k) & (q - k < window)

    mask = create_block_mask(visible, None, None, seq_len, seq_len, device=str(device))
    return partial(torch.compile(flex_attention, dynamic=False), block_mask=mask)


class Attention(nn.Module):
    def __init__(self, recipe: Recipe, layer: int) -> None:
        super().__init__()
        dim = recipe.dim
        self.heads, self.slides = recipe.heads, recipe.slides(layer)
        bound = INIT_SCALE * math.sqrt(3 / dim)
        self.qkv = nn.Parameter(torch.empty(3, dim, dim).uniform_(-bound, bound))  # three matrices to Muon
        self.out = nn.Parameter(torch.zeros(dim, dim))
        if recipe.has_value_embedding(layer):
            self.gate = nn.Parameter(torch.zeros(recipe.heads, GATE_CHANNELS))

    def forward(self, x: Tensor, value: Tensor | None, frame: Frame) -> Tensor:
        """x [B, T, D]; value [B, T, D] is this layer's value embedding, of a layer that has one."""
        qkv = linear(x, self.qkv.flatten(0, 1)).unflatten(-1, (3, self.heads, -1))  # [B, T, 3, H, head_dim]
        q, k = rotate(norm(qkv[:, :, :2]), frame).unbind(2)
        v = qkv[:, :, 2]
        if value is not None:
            gate = 2 * torch.sigmoid(linear(x[..., :GATE_CHANNELS], self.gate))  # [B, T, H], 1 at the start
            v = v + gate.unsqueeze(-1) * value.unflatten(-1, (self.heads, -1))
        attend = frame.sliding if self.slides else full_attention
        y = attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))  # [B, H, T, head_dim]
        return linear(y.transpose(1, 2).flatten(2), self.out)


class MLP(nn.Module):
    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        dim, hidden = recipe.dim, recipe.mlp_ratio * recipe.dim
        bound = INIT_SCALE * math.sqrt(3 / dim)
        self.up = nn.Parameter(torch.empty(hidden, dim).uniform_(-bound, bound))
        self.down = nn.Parameter(torch.zeros(dim, hidden))

    def forward(self, x: Tensor) -> Tensor:
        """ReLU² (So et al., arXiv 2109.08668)."""
        return linear(F.relu(linear(x, self.up)).square(), self.down)


class Block(nn.Module):
    """One layer. On a GPU this is what is compiled: a layer once, not the model, makes for a short start."""

    def __init__(self, recipe: Recipe, layer: int) -> None:
        super().__init__()
        self.attention, self.mlp = Attention(recipe, layer), MLP(recipe)

    def forward(
        self, x: Tensor, x0: Tensor, scales: tuple[Tensor, Tensor], tokens: Tensor, values: Tensor | None, frame: Frame
    ) -> Tensor:
        """x, x0 [B, T, D]; scales: of the stream and of x0, mixed in; values [V, D]: its value embedding, if any."""
        x = scales[0] * x + scales[1] * x0
        value = None if values is None else F.embedding(tokens, values).to(x.dtype)
        x = x + self.attention(norm(x), value, frame)
        return x + self.mlp(norm(x))


class GPT(nn.Module):
    """Tokens int64 [B, T] -> logits float32 [B, T, V]."""

    flops_per_token: float

    def __init__(self, recipe: Recipe, vocab_size: int) -> None:
        super().__init__()
        self.recipe, self.vocab_size = recipe, vocab_size
        padded = 64 * math.ceil(vocab_size / 64)  # the head's GEMM wants a round width
        bound = INIT_SCALE * math.sqrt(3 / recipe.dim)
        self.embed = nn.Parameter(torch.randn(vocab_size, recipe.dim))
        self.values = nn.ParameterDict(
            {
                str(layer): nn.Parameter(torch.empty(vocab_size, recipe.dim).uniform_(-bound, bound))
                for layer in range(recipe.depth)
                if recipe.has_value_embedding(layer)
            }
        )
        self.blocks = nn.ModuleList(Block(recipe, layer) for layer in range(recipe.depth))
        self.head = nn.Parameter(0.001 * torch.randn(padded, recipe.dim))
        self.resid_scale = nn.Parameter(torch.ones(recipe.depth))  # of the stream as it enters a layer
        self.x0_scale = nn.Parameter(torch.full((recipe.depth,), X0_INIT))  # of the embedding, mixed in again
        self._frames: dict[int, Frame] = {}

    def frame(self, seq_len: int) -> Frame:
        """The same one each time."""
        if seq_len not in self._frames:
            recipe, device = self.recipe, self.embed.device
            half = torch.arange(recipe.head_dim // 2, device=device) * (2 / recipe.head_dim)
            angle = torch.outer(torch.arange(seq_len, device=device), recipe.rope_base**-half)[:, None, None, :]
            cos, sin = angle.cos().to(recipe.dtype), angle.sin().to(recipe.dtype)
            sliding = sliding_attention(seq_len, recipe.short_window, device)
            self._frames[seq_len] = Frame(torch.cat((cos, cos), -1), torch.cat((sin, -sin), -1), sliding)
        return self._frames[seq_len]

    def stream(self, tokens: Tensor, frame: Frame) -> Tensor:
        """What the last layer leaves, [B, T, D]."""
        x = x0 = norm(F.embedding(tokens, self.embed).to(self.recipe.dtype))
        scales = zip(self.resid_scale.unbind(), self.x0_scale.unbind(), strict=True)
        for layer, (block, pair) in enumerate(zip(self.blocks, scales, strict=True)):
            x = block(x, x0, pair, tokens, self.values.get(str(layer)), frame)
        return x

    def unembed(self, x: Tensor) -> Tensor:
        """Logits float32 [B, T, V], within ±SOFTCAP."""
        logits = linear(norm(x) / SOFTCAP, self.head)[..., : self.vocab_size]  # divided where it is narrow
        return SOFTCAP * torch.tanh(logits.float())

    def cross_entropy(self, x: Tensor, targets: Tensor) -> Tensor:
        """Mean nats per token."""
        return F.cross_entropy(self.unembed(x).flatten(0, 1), targets.flatten())

    def loss(self, tokens: Tensor, targets: Tensor, frame: Frame) -> Tensor:
        """Mean nats per token of a batch."""
        return self.cross_entropy(self.stream(tokens, frame), targets)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.unembed(self.stream(tokens, self.frame(tokens.size(1))))

    def compile_parts(self) -> None:
        """Compiles the layers, of which most share one graph, and the loss."""
        for block in self.blocks:
            block.compile(dynamic=False)
        self.cross_entropy = torch.compile(self.cross_entropy, dynamic=False)  # type: ignore[method-assign]

    def count_flops_per_token(self, seq_len: int) -> float:
        """Of training: 6 a matrix weight, 12 · dim · span a layer of attention (PaLM, arXiv 2204.02311, app. B)."""
        r = self.recipe
        matrices = sum(p.numel() for p in self.blocks.parameters()) + self.head.numel()
        spans = sum(min(r.short_window, seq_len) if r.slides(layer) else seq_len for layer in range(r.depth))
        return float(6 * matrices + 12 * r.dim * spans)


def load(weights: Path, device: torch.device | str) -> nn.Module:
    """The trained model, for scoring. Its vocabulary is read off the embedding, the rest is this file's constants."""
    device = torch.device(device)
    with safe_open(weights, framework="pt") as file:
        vocab_size, _ = file.get_slice("embed").get_shape()
    with device:
        model = GPT(recipe_for(device), vocab_size)
    load_model(model, weights, device=str(device))
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


def gradient(p: Tensor) -> Tensor:
    assert p.grad is not None
    return p.grad


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
    across = -1 if m <= n else -2
    square = update.square().mean(dim=across, keepdim=True)
    variance.mul_(MUON_BETA2).add_(square * (1 - MUON_BETA2))
    scale = variance.clamp_min(1e-10).rsqrt()
    before = square.sum(dim=(-2, -1), keepdim=True)
    after = (square * scale.square()).sum(dim=(-2, -1), keepdim=True)
    update = update * (scale * (before / after.clamp_min(1e-10)).sqrt())
    weight.sub_(lr * math.sqrt(max(1, m / n)) * (update + decay * weight * (update * weight >= 0)))


class Stack:
    """Parameters whose matrices have one shape, taken together as [K, m, n]; a [3, m, n] one counts as three."""

    def __init__(self, params: list[nn.Parameter]) -> None:
        self.params: list[Tensor] = [*params]
        k, m, n = self.weights().shape
        device = params[0].device
        self.momentum_buffer = torch.zeros(k, m, n, device=device)
        self.variance = torch.zeros((k, m, 1) if m <= n else (k, 1, n), device=device)

    def weights(self) -> Tensor:
        """A copy, [K, m, n]."""
        return torch.cat([p.detach().view(-1, *p.shape[-2:]) for p in self.params])

    def gradients(self) -> Tensor:
        """A copy, [K, m, n]."""
        return torch.cat([gradient(p).view(-1, *p.shape[-2:]) for p in self.params])

    def write(self, weights: Tensor) -> None:
        """Puts [K, m, n] into the parameters."""
        parts = weights.split([p.numel() // weights[0].numel() for p in self.params])
        torch._foreach_copy_(self.params, [part.view_as(p) for part, p in zip(parts, self.params, strict=True)])


class MuonAdamW:
    """Muon for the matrices of the blocks, AdamW for embeddings, head and scalars. Every rank holds all state."""

    def __init__(self, model: GPT) -> None:
        recipe, device = model.recipe, model.embed.device
        width = (recipe.dim / 768) ** -0.5  # AdamW's learning rates are stated for a width of 768
        embedding_lr = recipe.embedding_lr * width
        groups: list[dict[str, Any]] = [
            {"params": [model.embed], "lr": embedding_lr},
            {"params": [*model.values.values()], "lr": embedding_lr, "weight_decay": VALUE_WEIGHT_DECAY},
            {"params": [model.head], "lr": recipe.head_lr * width},
            {"params": [model.resid_scale], "lr": 0.01 * SCALAR_LR},
            {"params": [model.x0_scale], "lr": SCALAR_LR, "betas": X0_BETAS},
        ]
        self.adamw = torch.optim.AdamW(groups, betas=ADAM_BETAS, eps=1e-10, weight_decay=0.0, fused=True)
        self.base_lrs = [group["lr"] for group in self.adamw.param_groups]
        by_shape: dict[torch.Size, list[nn.Parameter]] = {}
        for p in model.blocks.parameters():
            by_shape.setdefault(p.shape[-2:], []).append(p)
        self.stacks = [Stack(params) for params in by_shape.values()]
        self.matrix_lr = recipe.matrix_lr
        # Tensors, for a compiler would build a number in, and start over when it changes.
        self.lr, self.momentum, self.decay = (torch.zeros((), device=device) for _ in range(3))
        self.update = torch.compile(muon_update, dynamic=False) if device.type == "cuda" else muon_update

    @torch.no_grad()
    def step(self, progress: float) -> None:
        """Takes one step with the gradients that the parameters hold."""
        scale = lr_scale(progress)
        for group, lr in zip(self.adamw.param_groups, self.base_lrs, strict=True):
            group["lr"] = lr * scale
        self.adamw.step()
        self.lr.fill_(self.matrix_lr * scale)
        self.momentum.fill_(muon_momentum(progress))
        self.decay.fill_(weight_decay(progress))
        for stack in self.stacks:
            weights, state = stack.weights(), (stack.momentum_buffer, stack.variance)
            self.update(weights, stack.gradients(), *state, self.lr, self.momentum, self.decay)
            stack.write(weights)

    def reset(self) -> None:
        """Forgets all steps taken."""
        self.adamw.state.clear()
        for stack in self.stacks:
            stack.momentum_buffer.zero_()
            stack.variance.zero_()


# ---- Schedules: pure functions of progress in [0, 1] ----------------------------------------------------------------


def lr_scale(progress: float) -> float:
    """1, then linear warm-down to FINAL_LR."""
    if progress <= 1 - WARMDOWN:
        return 1.0
    left = (1 - progress) / WARMDOWN
    return left + (1 - left) * FINAL_LR


def muon_momentum(progress: float) -> float:
    """Linear from MUON_MOMENTUM_START to MUON_MOMENTUM, then that."""
    if progress >= MUON_MOMENTUM_WARMUP:
        return MUON_MOMENTUM
    return MUON_MOMENTUM_START + progress / MUON_MOMENTUM_WARMUP * (MUON_MOMENTUM - MUON_MOMENTUM_START)


def weight_decay(progress: float) -> float:
    """Linear to 0."""
    return WEIGHT_DECAY * (1 - progress)


# ---- The run --------------------------------------------------------------------------------------------------------

LOG_LAG = 2  # steps


class LossLog:
    """Tells the run each step's loss without stalling the device: a loss is read LOG_LAG steps after it was computed.

    Waiting for that step also keeps the queue of a GPU short, so that what is trained keeps up with the clock.
    """

    def __init__(self, run: OpenRun) -> None:
        self.run = run
        self.pending: deque[tuple[Tensor, torch.cuda.Event | None]] = deque()
        self.read = 0

    def add(self, loss: Tensor) -> None:
        """Takes the loss of the step that was just queued, and tells the one that is due."""
        copy = loss.to("cpu", non_blocking=True)
        copied = torch.cuda.Event() if loss.is_cuda else None
        if copied is not None:
            copied.record()
        self.pending.append((copy, copied))
        if len(self.pending) > LOG_LAG:
            self.tell()

    def tell(self) -> None:
        """Waits for the oldest loss that is not told yet."""
        loss, copied = self.pending.popleft()
        if copied is not None:
            copied.synchronize()
        self.run.log(self.read, loss.item())
        self.read += 1

    def flush(self) -> None:
        while self.pending:
            self.tell()


class Trainer:
    """One rank's share of training: micro-batches in, now and then a step."""

    def __init__(self, run: OpenRun, recipe: Recipe) -> None:
        self.run, self.seq_len = run, min(recipe.seq_len, run.seq_len)
        self.rows, self.accumulate = micro_batches(recipe, self.seq_len, run.world_size)
        with run.device:
            self.model = GPT(recipe, run.vocab_size)
        self.model.flops_per_token = self.model.count_flops_per_token(self.seq_len)
        self.optimizer = MuonAdamW(self.model)
        self.frame = self.model.frame(self.seq_len)
        if run.device.type == "cuda":
            self.model.compile_parts()

    def accumulate_gradients(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Forward and backward of one micro-batch, int64 [rows, T]; its loss."""
        loss = self.model.loss(inputs, targets, self.frame)
        (loss / (self.accumulate * self.run.world_size)).backward()
        return loss.detach()

    def step(self, progress: float) -> None:
        """Sums the gradients over ranks, takes an optimiser step, drops them."""
        if self.run.world_size > 1:
            for work in [dist.all_reduce(gradient(p), async_op=True) for p in self.model.parameters()]:
                work.wait()
        self.optimizer.step(progress)
        self.model.zero_grad()

    def warm_up(self) -> None:
        """Compiles and touches everything off the clock, on random tokens, then puts all back as it was."""
        saved = {name: t.clone() for name, t in self.model.state_dict().items()}
        with torch.random.fork_rng(devices=[self.run.device] if self.run.device.type == "cuda" else []):
            for _ in range(2):
                self.accumulate_gradients(*self.run.dummy_batch(self.rows, self.seq_len))
                self.step(0.0)
        self.model.load_state_dict(saved)
        self.optimizer.reset()
        gc.collect()
        gc.freeze()

    def train(self) -> None:
        """Until the budget is used; micro-batches that no longer make a whole step are dropped."""
        log = LossLog(self.run)
        for count, (inputs, targets) in enumerate(self.run.batches(self.rows, self.seq_len), 1):
            loss = self.accumulate_gradients(inputs, targets)
            if count % self.accumulate == 0:
                self.step(self.run.progress())
                log.add(loss)
        log.flush()


def main() -> None:
    run = prepare.open_run(total_steps=TOTAL_BATCHES)
    recipe = recipe_for(run.device)
    check(recipe)
    if run.world_size > 1:
        on_gpu = run.device.type == "cuda"
        dist.init_process_group("nccl" if on_gpu else "gloo", device_id=run.device if on_gpu else None)
    trainer = Trainer(run, recipe)
    trainer.warm_up()
    trainer.train()
    run.finish(trainer.model)
    if run.world_size > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
