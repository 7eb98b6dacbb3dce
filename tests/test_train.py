"""train.py: the model's promises, the optimiser's mathematics, and whole runs on a CPU through the real hand-over."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_model

import train
from nightshift import lint, openrun
from nightshift.data import write_shard
from nightshift.handover import SOCKET_ENV, RankEnd, RunnerEnd, Settings
from nightshift.openrun import PAGE_BYTES
from nightshift.proposers import knobs

CPU = torch.device("cpu")
TRAIN_PY = Path(train.__file__)
VOCAB = 100  # no multiple of 64: the head is padded


def resized(recipe: train.Recipe, **constants: object) -> train.Recipe:
    return train.Recipe(**{**vars(recipe), **constants})


SMALL = resized(
    train.recipe_for(CPU, VOCAB), depth=4, heads=2, head_dim=16, windows="SSL", short_window=8, ngram_rows=500
)

unit = st.floats(0, 1)


def stirred_model(recipe: train.Recipe = SMALL) -> train.GPT:
    """A model whose zero-initialised matrices are not zero, so that every path carries something."""
    model = train.GPT(recipe, VOCAB)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model.eval()


# ---- Model


def test_load_gives_the_saved_model_back(tmp_path: Path) -> None:
    model = stirred_model(train.recipe_for(CPU, VOCAB))
    save_model(model, str(tmp_path / "weights.safetensors"))
    tokens = torch.randint(VOCAB, (2, 40))
    with torch.inference_mode():
        loaded = train.load(tmp_path / "weights.safetensors", "cpu")
        assert not loaded.training
        logits = loaded(tokens)
        assert logits.shape == (2, 40, 128) and logits.dtype == torch.float32  # the vocabulary is padded
        assert torch.equal(logits[..., :VOCAB], model(tokens))


def test_logits_stay_within_the_cap() -> None:
    model = stirred_model()
    with torch.no_grad():
        model.head.mul_(1000)
        assert model(torch.randint(VOCAB, (2, 20))).abs().max() <= train.SOFTCAP


@pytest.mark.parametrize("windows", ["L", "S", "SSL"])
def test_a_later_token_changes_no_earlier_logits(windows: str) -> None:
    model = stirred_model(resized(SMALL, windows=windows))
    tokens = torch.randint(VOCAB, (1, 32))
    changed = tokens.clone()
    changed[0, 20] = (tokens[0, 20] + 1) % VOCAB
    with torch.no_grad():
        before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :20], after[:, :20])
    assert ((before[:, 20:] - after[:, 20:]).abs().amax(-1) > 1e-6).all()


def test_a_sliding_layer_forgets_what_left_its_window() -> None:
    model = stirred_model()
    layer, angles = model.layers[0], model.angles(32)
    assert layer.window == SMALL.short_window and model.layers[-1].window > 32
    x = torch.randn(1, 32, SMALL.dim)
    moved = x.clone()
    moved[0, 5] += 1
    value = torch.zeros_like(x) if hasattr(layer, "gate") else None
    with torch.no_grad():
        differs = (layer.attention(x, value, angles) - layer.attention(moved, value, angles)).abs().amax(-1)[0] > 1e-7
    assert differs.tolist() == [5 <= i < 5 + SMALL.short_window for i in range(32)]


@settings(deadline=None)
@given(st.integers(1, 24), st.integers(1, 30))
@example(8, 8)
def test_attention_is_the_naive_one(seq_len: int, window: int) -> None:
    mask = torch.tensor([[i - window < j <= i for j in range(seq_len)] for i in range(seq_len)])
    qkv = torch.randn(1, seq_len, 3, 2, 4)
    q, k, v = (x.transpose(1, 2) for x in qkv.unbind(2))
    naive = ((q @ k.mT / 2).masked_fill(~mask, -math.inf)).softmax(-1) @ v
    torch.testing.assert_close(train.attend(qkv, window), naive.transpose(1, 2), atol=1e-5, rtol=1e-4)


def test_every_second_layer_has_a_value_embedding_and_a_gate() -> None:
    model = train.GPT(resized(SMALL, depth=5), VOCAB)
    assert set(model.values) == {"0", "2", "4"}
    for number, layer in enumerate(model.layers):
        gate = getattr(layer, "gate", None)
        assert (gate is not None) == (str(number) in model.values)
        if gate is not None:
            assert gate.shape == (SMALL.heads, train.GATE_CHANNELS)
            assert model.values[str(number)].shape == (128, SMALL.dim)


def test_a_gate_of_a_head_scales_that_head_alone() -> None:
    """At a single position attention returns its value, so the layer's output shows what the gate let through."""
    model = stirred_model()
    layer, angles, dim = model.layers[-1], model.angles(1), SMALL.head_dim
    x, value = torch.randn(1, 1, SMALL.dim), torch.randn(1, 1, SMALL.dim)
    with torch.no_grad():
        layer.out.copy_(torch.eye(SMALL.dim))
        layer.gate.zero_()
        layer.gate[1] = 100 * x[0, 0, : train.GATE_CHANNELS].sign()  # wide open: 2 instead of 1
        added = layer.attention(x, value, angles) - layer.attention(x, torch.zeros_like(value), angles)
    torch.testing.assert_close(added[..., :dim], value[..., :dim], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(added[..., dim:], 2 * value[..., dim:], atol=1e-5, rtol=1e-5)


def test_rotary_scores_depend_on_the_distance_alone() -> None:
    angles = train.GPT(SMALL, VOCAB).angles(32)
    qkv = torch.randn(1, 1, 3, 1, SMALL.head_dim).expand(1, 32, 3, 1, -1)
    q, k, _ = train.finish_heads(qkv, None, angles)[0, :, :, 0].unbind(1)
    scores = q @ k.T  # [32, 32]
    for distance in (0, 3, 11):
        diagonal = scores.diagonal(-distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), atol=1e-4, rtol=1e-4)
    assert scores.diagonal(-11)[0].sub(scores[0, 0]).abs() > 1e-3


def test_an_ngram_is_looked_up_by_its_last_tokens_alone() -> None:
    model = train.GPT(SMALL, VOCAB)
    tokens = torch.randint(VOCAB, (4, 40))
    ids, found = model.look_up(tokens)
    assert ids.shape == (4, 40, len(train.NGRAMS)) and found.shape == (4, 40, SMALL.dim)
    for column, n in enumerate(train.NGRAMS):
        seen: dict[tuple[int, ...], int] = {}
        for row, numbers in zip(tokens.tolist(), ids[..., column].tolist(), strict=True):
            assert all(column * SMALL.ngram_rows <= number < (column + 1) * SMALL.ngram_rows for number in numbers)
            for at in range(n - 1, 40):
                assert seen.setdefault(tuple(row[at - n + 1 : at + 1]), numbers[at]) == numbers[at]
        assert len(set(seen.values())) > 0.7 * min(len(seen), SMALL.ngram_rows) * (1 - math.exp(-1))


# ---- Optimiser


@settings(deadline=None)
@given(st.integers(1, 3), st.integers(2, 48), st.integers(2, 48))
def test_polar_express_is_near_the_polar_factor(k: int, m: int, n: int) -> None:
    x = torch.randn(k, m, n)
    u, s, vh = torch.linalg.svd(x.double(), full_matrices=False)
    solid = s > 0.02 * s.norm(dim=-1, keepdim=True)  # what five steps lift to 1
    got = torch.einsum("kmr,kmn,krn->kr", u, train.polar_express(x).double(), vh)
    assert ((got - 1).abs()[solid] < 0.2).all()
    assert (got < 1.2).all()
    off = train.polar_express(x).double() - torch.einsum("kmr,kr,krn->kmn", u, got, vh)
    assert off.abs().max() < 1e-3  # the singular vectors stay


def muon_state(k: int, m: int, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros(k, m, n), torch.zeros((k, m, 1) if m <= n else (k, 1, n))


def scalars(*values: float) -> list[torch.Tensor]:
    return [torch.tensor(v) for v in values]


@pytest.mark.parametrize("shape", [(16, 16), (8, 24), (24, 8)])
def test_muon_takes_matrices_together_as_it_takes_them_one_by_one(shape: tuple[int, int]) -> None:
    weight, grad = torch.randn(3, *shape), torch.randn(3, *shape)
    together = weight.clone()
    train.muon_update(together, grad, *muon_state(3, *shape), *scalars(0.1, 0.9, 0.2))
    for i in range(3):
        alone = weight[i : i + 1].clone()
        train.muon_update(alone, grad[i : i + 1], *muon_state(1, *shape), *scalars(0.1, 0.9, 0.2))
        torch.testing.assert_close(alone[0], together[i], atol=1e-5, rtol=1e-4)


def test_muon_normalises_variance_without_changing_the_norm() -> None:
    weight, grad = torch.zeros(1, 24, 8), torch.randn(1, 24, 8)
    state = muon_state(1, 24, 8)
    train.muon_update(weight, grad, *state, *scalars(0.1, 0.0, 0.0))
    expected = 0.1 * math.sqrt(24 / 8) * train.polar_express(grad).norm()
    torch.testing.assert_close(weight.norm(), expected, atol=1e-4, rtol=1e-4)
    columns = weight.square().mean(dim=-2)[0]
    assert columns.max() / columns.min() < 1.001
    assert (state[1] > 0).all() and state[0].norm() > 0


def test_weight_decay_is_cautious() -> None:
    weight, grad = torch.randn(1, 8, 8), torch.randn(1, 8, 8)
    plain, decayed = weight.clone(), weight.clone()
    train.muon_update(plain, grad, *muon_state(1, 8, 8), *scalars(0.1, 0.9, 0.0))
    train.muon_update(decayed, grad, *muon_state(1, 8, 8), *scalars(0.1, 0.9, 0.5))
    along = (weight - plain) * weight >= 0
    assert 0 < along.sum() < 64
    torch.testing.assert_close(decayed, plain - 0.1 * 0.5 * weight * along)


def test_every_parameter_has_one_optimiser() -> None:
    model = train.GPT(SMALL, VOCAB)
    optimizer = train.Optimizer(model)
    held = [p.data_ptr() for group in optimizer.adamw.param_groups for p in group["params"]]
    held += [p.data_ptr() for stack in optimizer.stacks for p in stack.params] + [model.ngrams.data_ptr()]
    assert sorted(held) == sorted(p.data_ptr() for p in model.parameters())


def test_parameters_are_views_of_their_stack() -> None:
    model = train.GPT(SMALL, VOCAB)
    before = {name: p.detach().clone() for name, p in model.layers.named_parameters()}
    for stack in train.Optimizer(model).stacks:
        stack.weights += 1
    for name, p in model.layers.named_parameters():
        assert torch.equal(p, before[name] + 1)


def test_rounding_leaves_every_logit_and_gives_each_parameter_its_own_memory(tmp_path: Path) -> None:
    model = stirred_model()
    optimizer = train.Optimizer(model)
    tokens = torch.randint(VOCAB, (2, 20))
    with torch.no_grad():
        before = model(tokens)
        model.round_weights()
        for stack in optimizer.stacks:
            stack.weights.zero_()
        assert torch.equal(model(tokens), before)
    save_model(model, str(tmp_path / "weights.safetensors"))


def test_only_the_ngrams_that_a_step_met_move() -> None:
    model = train.GPT(SMALL, VOCAB)
    optimizer = train.Optimizer(model)
    tokens = torch.randint(VOCAB, (2, 21))
    model.loss(tokens[:, :-1], tokens[:, 1:]).backward()
    with torch.no_grad():
        optimizer.step(0.0)
    met = set(model.look_up(tokens[:, :-1])[0].flatten().tolist())
    assert set(model.ngrams.abs().sum(1).nonzero().flatten().tolist()) == met
    assert not optimizer.total.any() and not model.met
    lengths = model.ngrams.detach()[sorted(met)].square().mean(1).sqrt()
    torch.testing.assert_close(lengths, torch.full_like(lengths, train.NGRAM_LR))  # of a first step


# ---- Schedules, sizes, marks


@settings(deadline=None)
@given(unit, unit)
@example(0.0, 1.0)
def test_schedules_stay_in_bounds(a: float, b: float) -> None:
    early, late = train.schedule(min(a, b)), train.schedule(max(a, b))
    for scale, momentum, decay in (early, late):
        assert 0 <= scale <= 1
        assert train.MUON_MOMENTUM_START <= momentum <= train.MUON_MOMENTUM
        assert 0 <= decay <= train.WEIGHT_DECAY
    assert early[0] >= late[0] and early[1] <= late[1] and early[2] >= late[2]


def test_the_learning_rate_starts_and_ends_where_it_says() -> None:
    assert train.schedule(0.0)[0] == 1 and train.schedule(1.0)[0] == pytest.approx(train.FINAL_LR)
    assert train.schedule(1 - train.WARMDOWN)[0] == pytest.approx(1)


@settings(deadline=None)
@given(st.integers(1, 1 << 16), st.integers(0, 64), st.sampled_from([64, 100, 128]), st.integers(1, 8))
def test_a_batch_divides_or_the_error_says_what_would(tokens: int, rows: int, seq_len: int, ranks: int) -> None:
    recipe = resized(SMALL, batch_tokens=tokens, rows=rows)
    try:
        recipe.check(seq_len, ranks)
    except ValueError as error:
        constant, _, works = str(error).partition("; it can be ")
        if constant.startswith("CPU_BATCH_TOKENS"):
            for size in works.partition(":")[0].split(" or "):
                resized(recipe, batch_tokens=int(size), rows=1).check(seq_len, ranks)
        else:
            assert constant.startswith("CPU_ROWS")
            for size in works.partition("[")[2].partition("]")[0].split(", "):
                resized(recipe, rows=int(size)).check(seq_len, ranks)
    else:
        step = tokens // (seq_len * ranks)
        assert min(rows, step) * max(1, step // rows) * seq_len * ranks == tokens


@pytest.mark.parametrize(
    "change, message",
    [
        ({"head_dim": 15}, "CPU_HEAD_DIM is 15; .* even"),
        ({"head_dim": 48, "dtype": torch.bfloat16}, "CPU_HEAD_DIM is 48; .* 32, 64 or 128"),
        ({"windows": "SX"}, "CPU_WINDOWS is 'SX'"),
        ({"windows": ""}, "CPU_WINDOWS is ''"),
        ({"heads": 1, "head_dim": 16}, "CPU_HEADS is 1; .* GATE_CHANNELS, 32, or more"),
        ({"depth": 0}, "CPU_DEPTH is 0"),
        ({"heads": 0}, "CPU_HEADS is 0"),
        ({"short_window": 129}, "CPU_SHORT_WINDOW is 129; it can be 1 to 128"),
        ({"batch_tokens": 1000}, "CPU_BATCH_TOKENS is 1000; it can be 896 or 1024"),
        ({"rows": 3}, "CPU_ROWS is 3; .*1, 2, 4, 8"),
        ({"batch_tokens": 64}, "CPU_BATCH_TOKENS is 64; it can be 128 or 256"),
    ],
)
def test_an_impossible_size_names_its_constant(change: dict[str, object], message: str) -> None:
    SMALL.check(128, 1)
    with pytest.raises(ValueError, match=message):
        resized(SMALL, **change).check(128, 1)


@pytest.mark.parametrize(
    "device, vocab_size, name", [("cpu", 8192, "CPU"), ("cuda", 8192, "GPU"), ("cuda", 50304, "SPEEDRUN")]
)
def test_the_recipes_as_they_stand_can_be_trained(device: str, vocab_size: int, name: str) -> None:
    sizes = train.recipe_for(torch.device(device), vocab_size)
    assert sizes.depth == getattr(train, f"{name}_DEPTH") and sizes.names["depth"] == f"{name}_DEPTH"
    assert sizes.names["rope_base"] == ("CPU" if name == "CPU" else "GPU") + "_ROPE_BASE"
    for ranks in (1, 2, 4, 8):
        sizes.check(sizes.seq_len, ranks)


def test_every_knob_mark_parses() -> None:
    text = TRAIN_PY.read_text()
    on_cpu, on_cuda = ({knob.name for knob in knobs.parse(text, kind)} for kind in ("cpu", "cuda"))
    assert len(on_cpu | on_cuda) == sum("  # knob" in line for line in text.splitlines() if "=" in line.split("#")[0])
    assert "CPU_MATRIX_LR" in on_cpu - on_cuda and "GPU_MATRIX_LR" in on_cuda - on_cpu
    assert "WARMDOWN" in on_cpu & on_cuda


def test_it_sets_no_seed_of_its_own() -> None:
    assert lint.check(TRAIN_PY.read_text()) == []


def test_importing_it_starts_nothing() -> None:
    code = (
        "import torch; state = torch.get_rng_state(); import train; "
        "assert torch.equal(state, torch.get_rng_state()); "
        "print(torch.cuda.is_initialized())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=TRAIN_PY.parent, capture_output=True, text=True)
    assert done.stdout.split() == ["False"], done.stderr


# ---- Whole runs


class Runner:
    """A runner's end of the socket, served by a thread: it starts the clock when asked, and keeps every loss."""

    def __init__(self, folder: Path, steps: int, ranks: int) -> None:
        self.socket, self.weights = folder / "run.sock", folder / "weights.safetensors"
        self.settings = Settings(3, "cpu", ranks, VOCAB, 0, 256, "val_bpb", 60.0, steps, 3.0, str(self.weights))
        counts = np.arange(200_000)
        write_shard(folder / "shard.bin", ((counts * counts // 7) % VOCAB).astype(np.uint16))
        np.save(folder / "starts.npy", np.array([0], dtype=np.uint32))
        self.files = [os.memfd_create("clock")]
        os.ftruncate(self.files[0], PAGE_BYTES)
        self.files += [os.open(folder / name, os.O_RDONLY) for name in ("shard.bin", "starts.npy")]
        self.losses: dict[int, float] = {}
        self.over = threading.Event()

    def serve(self, ear: RunnerEnd) -> None:
        while not self.over.is_set():
            for key, _ in ear.selector.select(0.05):
                ear.handle(key.fileobj)
                if math.isfinite(ear.loss):
                    self.losses[ear.step] = ear.loss
            if ear.all_waiting:
                ear.begin()


@contextmanager
def runner(folder: Path, steps: int, ranks: int = 1) -> Iterator[tuple[Runner, RunnerEnd]]:
    it = Runner(folder, steps, ranks)
    with RunnerEnd(it.socket, it.settings, it.files) as ear:
        thread = threading.Thread(target=it.serve, args=(ear,))
        thread.start()
        try:
            yield it, ear
        finally:
            it.over.set()
            thread.join()
            for fd in it.files:
                os.close(fd)


def test_warming_up_leaves_no_trace(tmp_path: Path) -> None:
    with runner(tmp_path, steps=2) as (it, _):
        run = openrun.OpenRun(RankEnd(it.socket, 0), 0, 0, None)
        trainer = train.Trainer(run, train.recipe_for(CPU, VOCAB))
        before = {name: t.clone() for name, t in trainer.model.state_dict().items()}
        dice = torch.get_rng_state()
        trainer.warm_up()
        assert run.elapsed() == 0
        assert torch.equal(torch.get_rng_state(), dice)
        assert all(torch.equal(t, before[name]) for name, t in trainer.model.state_dict().items())
        assert all(p.grad is None for p in trainer.model.parameters())
        assert not trainer.optimizer.adamw.state and not trainer.optimizer.total.any() and not trainer.model.met
        assert all(not s.momentum_buffer.any() and not s.variance.any() for s in trainer.optimizer.stacks)
        trainer.train()
        assert any(not torch.equal(t, before[name]) for name, t in trainer.model.state_dict().items())


def run_train(it: Runner, ranks: int) -> None:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    environment = {**os.environ, SOCKET_ENV: str(it.socket), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher, str(TRAIN_PY)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_the_loss_falls_in_twenty_steps(tmp_path: Path, ranks: int) -> None:
    with runner(tmp_path, 20, ranks) as (it, ear):
        run_train(it, ranks)
        assert ear.saved and ear.finish is not None and ear.finish.steps == 20
        assert ear.finish.tokens == 20 * train.CPU_BATCH_TOKENS  # the batch is the same on any number of ranks
    assert sorted(it.losses) == list(range(20))
    assert it.losses[0] == pytest.approx(math.log(VOCAB), abs=0.05)
    assert it.losses[19] < it.losses[0] - 0.5
    logits = train.load(it.weights, CPU)(torch.arange(50)[None])
    assert logits.shape == (1, 50, 128) and torch.isfinite(logits).all()
