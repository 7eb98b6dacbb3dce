"""train.py's kernels beside the plain form of each in float64, on fresh random input, forward and backward.

On a CUDA device in bfloat16; elsewhere in float32, through Triton's interpreter (conftest.py asks for it). Meanwhile
all memory that torch.empty gives is NaN, so an element that no kernel wrote fails its comparison.
"""

from __future__ import annotations

import gc
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import train
from nightshift import openrun
from nightshift.data import write_shard
from nightshift.handover import Finish, Settings

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
DTYPE = torch.bfloat16 if CUDA else torch.float32
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1.5e-2}
VOCAB = 1000  # of the small GPU model: no multiple of 64
Pair = tuple[Tensor, Tensor]


pytestmark = pytest.mark.filterwarnings("ignore:::triton.runtime.interpreter")


@pytest.fixture
def poison() -> Iterator[None]:
    """Makes all memory that is not initialised NaN, and -1 of integers, while a test runs."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(3, device=DEVICE).isnan().all()
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def gpu(test: Callable[..., Any]) -> Callable[..., Any]:
    """Marks a test of what only a CUDA device can do."""
    reason = "no CUDA device is here: torch.compile takes the kernels as they are only there"
    return pytest.mark.gpu(pytest.mark.skipif(not CUDA, reason=reason)(test))


def leaf(*shape: int, scale: float = 1.0) -> Tensor:
    """Normal, of the kernels' dtype, and asking for its gradient."""
    return (scale * torch.randn(shape)).to(DEVICE, DTYPE).requires_grad_()


def twin(x: Tensor) -> Tensor:
    """The same in float64 on the CPU, where train.py takes the plain forms."""
    return x.detach().cpu().double().requires_grad_(x.requires_grad)


def error(ours: Tensor | None, exact: Tensor | None) -> float:
    """||ours - exact|| / ||exact||, NaN where any element of ours is."""
    assert ours is not None and exact is not None and ours.shape == exact.shape
    return ((ours.detach().cpu().double() - exact.detach()).norm() / exact.detach().norm()).item()


def compare(ours: Tensor, exact: Tensor, leaves: list[Tensor], twins: list[Tensor]) -> None:
    """Asserts that outputs agree, and all gradients, for one random gradient of the output."""
    assert ours.dtype == DTYPE
    assert error(ours, exact) < TOLERANCE[DTYPE]
    grad = torch.randn(ours.shape).to(DEVICE, DTYPE)
    ours.backward(grad)
    exact.backward(twin(grad))
    for number, (x, y) in enumerate(zip(leaves, twins, strict=True)):
        assert x.grad is not None and x.grad.dtype == DTYPE
        assert error(x.grad, y.grad) < TOLERANCE[DTYPE], f"the gradient of input {number}"


def angles(seq_len: int, head_dim: int) -> Pair:
    turn = 10 * torch.rand(seq_len, head_dim // 2)
    return turn.cos().to(DEVICE), turn.sin().to(DEVICE)


def exact_angles(given: Pair) -> Pair:
    return twin(given[0]), twin(given[1])


# ---- Heads: norm, rotation, value embedding


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("extra", [False, True], ids=["alone", "with value embedding"])
@pytest.mark.parametrize("shape", [(2, 33, 5, 32), (1, 17, 3, 64), (1, 50, 1, 128), (3, 64, 2, 64)], ids=str)
def test_heads(shape: tuple[int, int, int, int], extra: bool) -> None:
    B, T, H, D = shape
    qkv, value, turn = leaf(B, T, 3, H, D), leaf(B, T, H, D), angles(T, D)
    leaves = [qkv, value] if extra else [qkv]
    twins = [twin(x) for x in leaves]
    ours = train.heads(qkv, value if extra else None, *turn, False)
    exact = train.finish_heads(twins[0], twins[1] if extra else None, exact_angles(turn))
    compare(ours, exact, leaves, twins)


@pytest.mark.usefixtures("poison")
def test_heads_may_lie_anyhow_in_memory() -> None:
    """Strided input, strided value embedding, strided gradient."""
    B, T, H, D = 2, 20, 3, 32
    packed, value, turn = leaf(B, T, D, 3, H), leaf(B, H, T, D), angles(T, D)
    twins = [twin(packed), twin(value)]
    ours = train.heads(packed.permute(0, 1, 3, 4, 2), value.transpose(1, 2), *turn, False)
    exact = train.finish_heads(twins[0].permute(0, 1, 3, 4, 2), twins[1].transpose(1, 2), exact_angles(turn))
    compare(ours.permute(2, 0, 3, 1, 4), exact.permute(2, 0, 3, 1, 4), [packed, value], twins)


# ---- Sliding attention

SLIDING = [((1, 192, 5, 32), window) for window in (1, 20, 64, 100, 191)]
SLIDING += [((2, 128, 3, 64), window) for window in (20, 65, 127)]
SLIDING += [((1, 256, 1, 128), 100), ((1, 256, 1, 128), 128), ((3, 64, 1, 32), 63)]


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("shape, window", SLIDING, ids=str)
def test_sliding(shape: tuple[int, int, int, int], window: int) -> None:
    B, T, H, D = shape
    qkv = leaf(B, T, 3, H, D)
    exact = twin(qkv)
    ours, denominators = train.sliding(qkv, window)
    assert denominators.isfinite().all()
    compare(ours, train.attend(exact, window), [qkv], [exact])
    if window > 1:  # with a single key its weight is 1, and queries and keys have no gradient
        assert qkv.grad is not None and exact.grad is not None
        for name, part, exact_part in zip("qkv", qkv.grad.unbind(2), exact.grad.unbind(2), strict=True):
            assert error(part, exact_part) < TOLERANCE[DTYPE], f"the gradient of {name}"


@pytest.mark.usefixtures("poison")
def test_sliding_survives_scores_beyond_what_an_exponential_takes() -> None:
    qkv = leaf(1, 128, 3, 1, 32, scale=12.0)  # scores of some ±800
    exact = twin(qkv)
    assert error(train.sliding(qkv, 70)[0], train.attend(exact, 70)) < TOLERANCE[DTYPE]


@gpu
@pytest.mark.parametrize("seq_len, window", [(192, 192), (192, 500), (192, 70), (96, 20), (256, 1)])
def test_attend_picks_what_computes_the_same(seq_len: int, window: int) -> None:
    """Full attention, and rows that are no multiple of a block, have kernels of torch's own."""
    qkv = leaf(2, seq_len, 3, 3, 64)
    exact = twin(qkv)
    compare(train.attend(qkv, window), train.attend(exact, window), [qkv], [exact])


# ---- MLP


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("rows, dim, hidden", [(70, 64, 128), (128, 320, 256), (150, 160, 320), (1, 96, 288)])
def test_mlp(rows: int, dim: int, hidden: int) -> None:
    leaves = [leaf(rows, dim), leaf(hidden, dim, scale=dim**-0.5), leaf(dim, hidden, scale=hidden**-0.5)]
    twins = [twin(x) for x in leaves]
    x, up, down = twins
    compare(train.mlp(*leaves)[0], F.relu(x @ up.T).square() @ down.T, leaves, twins)


@pytest.mark.usefixtures("poison")
def test_mlp_takes_a_gradient_that_lies_the_other_way_in_memory() -> None:
    leaves = [leaf(40, 64), leaf(128, 64, scale=0.1), leaf(64, 128, scale=0.1)]
    twins = [twin(x) for x in leaves]
    x, up, down = twins
    compare(train.mlp(*leaves)[0].T, (F.relu(x @ up.T).square() @ down.T).T, leaves, twins)


@pytest.mark.usefixtures("poison")
def test_relu_squared_both_ways() -> None:
    rows, dim, hidden = 200, 96, 320
    x, up, grad, down = (twin(leaf(*s)) for s in ((rows, dim), (hidden, dim), (rows, dim), (dim, hidden)))
    low = [t.detach().to(DEVICE, DTYPE) for t in (x, up, grad, down)]
    act = train.relu_squared(low[0], low[1])
    assert error(act, F.relu(x @ up.T).square()) < TOLERANCE[DTYPE]
    back = train.relu_squared(low[2], low[3], act)
    assert error(back, (grad @ down) * 2 * twin(act).sqrt()) < TOLERANCE[DTYPE]


# ---- Loss


def loss_inputs(rows: int, dim: int, vocab: int, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """x / SOFTCAP [rows, dim], the head [V', dim], targets. The head's padding is as random as the rest of it."""
    x = leaf(rows, dim, scale=scale / train.SOFTCAP)
    return x, leaf(64 * math.ceil(vocab / 64), dim, scale=dim**-0.5), torch.randint(vocab, (rows,), device=DEVICE)


def exact_loss(x: Tensor, head: Tensor, targets: Tensor, vocab: int) -> Tensor:
    return train.soft_capped_loss((x * train.SOFTCAP)[None], head, targets.cpu()[None], vocab)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("rows, dim, vocab", [(37, 64, 100), (19, 160, 5000), (10, 32, 8256), (5, 96, 12289)])
def test_soft_capped_loss(rows: int, dim: int, vocab: int) -> None:
    """Vocabularies of one chunk and of several, full and not."""
    x, head, targets = loss_inputs(rows, dim, vocab, scale=3.0)
    targets[:2] = torch.tensor([0, vocab - 1], device=DEVICE)
    twins = [twin(x), twin(head)]
    ours, exact = train.SoftCappedLoss.apply(x, head, targets, vocab), exact_loss(*twins, targets, vocab)
    assert ours.dtype == torch.float32
    assert error(ours, exact) < TOLERANCE[DTYPE]
    (0.3 * ours).backward()
    (0.3 * exact).backward()
    assert error(x.grad, twins[0].grad) < TOLERANCE[DTYPE]
    assert error(head.grad, twins[1].grad) < TOLERANCE[DTYPE]
    assert head.grad is not None and not head.grad[vocab:].any()


@pytest.mark.usefixtures("poison")
def test_soft_capped_loss_of_logits_far_beyond_the_cap() -> None:
    x, head, targets = loss_inputs(24, 64, 5000, scale=3000.0)
    ours, exact = train.SoftCappedLoss.apply(x, head, targets, 5000), exact_loss(twin(x), twin(head), targets, 5000)
    assert error(ours, exact) < TOLERANCE[DTYPE]
    ours.backward()
    assert x.grad is not None and x.grad.isfinite().all()
    assert head.grad is not None and head.grad.isfinite().all()


# ---- Rows of the n-gram tables


def update_one_by_one(state: list[Tensor], ids: Tensor, lr: float) -> None:
    """What update_rows promises, in float64, a row after the other."""
    table, total, moment, count = state
    for row in ids.unique().tolist():
        grad, seen = total[row].clone(), count[row].item() + 1
        keep = min(1 - 1 / seen, train.ADAM_BETAS[1])  # a plain mean at first, then a running one
        moment[row] = keep * moment[row] + (1 - keep) * grad.square().mean()
        table[row] -= lr * grad / (moment[row] + 1e-30).sqrt()
        count[row] = seen
        total[row] = 0


def row_updates(update: Callable[..., None], rows: int, dim: int, named: int) -> None:
    """Three steps of `update` beside update_one_by_one; a row is named many times where `named` exceeds `rows`.

    Of the rows, every second one has seen 100 steps before, the others none.
    """
    seen = 100.0 * (torch.arange(rows, device=DEVICE) % 2)
    table, total = torch.zeros(2, rows, dim, device=DEVICE)
    state = [table, total, torch.rand(rows, device=DEVICE) * (seen > 0), seen]
    exact, lr = [twin(x) for x in state], torch.tensor(0.3, device=DEVICE)
    for _ in range(3):
        ids = torch.randint(rows, (named,))
        ids[-1] = ids[0]
        grads = torch.zeros(rows, dim)
        grads[ids] = torch.randn(rows, dim)[ids]
        state[1].copy_(grads)
        exact[1].copy_(grads)
        update(*state, ids.to(DEVICE), lr)
        update_one_by_one(exact, ids, 0.3)
        for ours, truth in zip(state, exact, strict=True):
            assert error(ours, truth) < 1e-5 if truth.any() else not ours.any()


@pytest.mark.parametrize("rows, dim, named", [(50, 16, 20), (30, 8, 500), (7, 24, 2)])
def test_update_rows(rows: int, dim: int, named: int) -> None:
    row_updates(train.update_rows, rows, dim, named)


@gpu
@pytest.mark.parametrize("rows, dim, named", [(50, 640, 20), (30, 640, 100_000), (5000, 160, 8192)])
def test_update_rows_compiled(rows: int, dim: int, named: int) -> None:
    """Of a row named thousands of times, no part of the grid may read what another has written."""
    row_updates(torch.compile(train.update_rows, dynamic=False), rows, dim, named)


def test_a_row_without_a_gradient_stays() -> None:
    table = torch.randn(4, 8, device=DEVICE)
    state = [table.clone(), *(torch.zeros(s, device=DEVICE) for s in ((4, 8), (4,), (4,)))]
    train.update_rows(*state, torch.tensor([1, 1, 3], device=DEVICE), torch.tensor(0.5, device=DEVICE))
    assert torch.equal(state[0], table)


# ---- As operators of a compiler


def a_layer(qkv: Tensor, value: Tensor, turn: Pair, up: Tensor, down: Tensor) -> Tensor:
    """Every operator once, and plain torch between them, which the compiler makes into kernels of its own."""
    out = train.sliding(train.heads(qkv * 1.5, value, *turn, False), 50)[0].flatten(0, 1).flatten(1)
    return out + train.mlp(train.norm(out), up, down)[0]


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=() if CUDA else pytest.mark.skip)])
def test_a_compiler_takes_the_operators_as_they_are(backend: str) -> None:
    B, T, H, D = 2, 128, 3, 32
    turn, hidden = angles(T, D), 2 * H * D
    leaves = [leaf(B, T, 3, H, D), leaf(B, T, H, D), leaf(hidden, H * D, scale=0.1), leaf(H * D, hidden, scale=0.1)]
    grad = torch.randn(B * T, H * D).to(DEVICE, DTYPE)
    grads = []
    for function in (a_layer, torch.compile(a_layer, backend=backend, dynamic=False, fullgraph=True)):
        out = function(*leaves[:2], turn, *leaves[2:])
        grads.append([out, *torch.autograd.grad(out, leaves, grad)])
    for eager, compiled in zip(*grads, strict=True):
        assert error(compiled, twin(eager)) < TOLERANCE[DTYPE]
    torch.compiler.reset()


# ---- A whole model


class Line:
    """Whoever runs a run, in the same process: `steps` batches of a sequence that repeats itself, losses kept."""

    def __init__(self, folder: Path, steps: int) -> None:
        weights = folder / "weights.safetensors"
        self.settings = Settings(3, DEVICE.type, 1, VOCAB, 0, 256, "val_bpb", 600.0, steps, 3.0, str(weights))
        counts = np.arange(400_000)
        write_shard(folder / "shard.bin", ((counts * counts // 7) % VOCAB).astype(np.uint16))
        np.save(folder / "starts.npy", np.array([0], dtype=np.uint32))
        self.folder, self.losses = folder, list[float]()

    def begin(self) -> tuple[float, list[int]]:
        clock = os.memfd_create("clock")
        os.ftruncate(clock, openrun.PAGE_BYTES)
        files = [os.open(self.folder / name, os.O_RDONLY) for name in ("shard.bin", "starts.npy")]
        return time.monotonic(), [clock, *files]

    def log(self, step: int, loss: float, tokens: int) -> None:
        self.losses.append(loss)

    def finish(self, finish: Finish) -> None:
        assert finish.steps == len(self.losses)

    def saved(self) -> None: ...


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> train.Recipe:
    """train.py's GPU constants made small, for the model that train.load builds of them too."""
    torch.compiler.reset()  # a layer's graphs of another test count towards how many are kept
    sizes = {"DEPTH": 4, "HEADS": 3, "HEAD_DIM": 64, "WINDOWS": "SSL", "SHORT_WINDOW": 64, "NGRAM_ROWS": 2**12}
    for name, value in {**sizes, "SEQ_LEN": 256, "BATCH_TOKENS": 2**12, "ROWS": 16}.items():
        monkeypatch.setattr(train, f"GPU_{name}", value)
    return train.recipe_for(DEVICE, VOCAB)


@gpu
def test_the_compiled_bf16_model_is_the_float32_one_on_a_cpu(small: train.Recipe, tmp_path: Path) -> None:
    """Loss and gradients, with weights of which none is zero, so that every path carries something."""
    trainer = train.Trainer(openrun.OpenRun(Line(tmp_path, 1), 0, 0, None), small)
    exact = train.GPT(train.Recipe(**{**vars(small), "dtype": torch.float32}), VOCAB)
    with torch.no_grad():
        for p in exact.parameters():
            p.add_(0.05 * torch.randn_like(p))
    trainer.model.load_state_dict(exact.state_dict())
    inputs, targets = torch.randint(VOCAB, (2, 4, 256))
    loss, exact_loss = trainer.accumulate_gradients(inputs.to(DEVICE), targets.to(DEVICE)), exact.loss(inputs, targets)
    assert loss.item() == pytest.approx(exact_loss.item(), rel=0.02)
    exact_loss.backward()
    for (name, p), q in zip(trainer.model.named_parameters(), exact.parameters(), strict=True):
        if p.requires_grad:
            assert q.grad is not None
            assert error(p.grad, q.grad.double()) < 0.05, name


@gpu
def test_thirty_steps_on_a_gpu_and_load_gives_the_model_back(small: train.Recipe, tmp_path: Path) -> None:
    line = Line(tmp_path, 30)
    run = openrun.OpenRun(line, 0, 0, None)
    trainer = train.Trainer(run, small)
    trainer.warm_up()
    gc.enable()
    trainer.train()
    trainer.model.round_weights()
    run.finish(trainer.model)
    assert line.losses[0] == pytest.approx(math.log(VOCAB), abs=0.05)
    assert len(line.losses) == 30 and line.losses[-1] < line.losses[0] - 0.5
    tokens = torch.randint(VOCAB, (2, 256), device=DEVICE)
    with torch.inference_mode(), torch.compiler.set_stance("force_eager"):
        loaded = train.load(Path(line.settings.weights), DEVICE)(tokens)
        assert loaded.dtype == torch.float32
        assert torch.equal(loaded[..., :VOCAB], trainer.model(tokens))
