"""The run's socket: whatever a rank sends, in whatever order, the runner hears it right or rejects the run."""

from __future__ import annotations

import contextlib
import json
import math
import os
import socket
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nightshift.handover import MAX_FDS, Finish, RankEnd, RunnerEnd, Settings, short_path
from nightshift.values import Reject

DONE: dict[str, Any] = asdict(Finish(bytes=8, steps=3, tokens=96, num_params=2, flops_per_token=12.0))


def told(world_size: int = 1) -> Settings:
    return Settings(1, "cpu", world_size, 300, 256, 32, "val_bpb", 1.0, None, 3.28, "weights.safetensors")


@contextlib.contextmanager
def runner_end(world_size: int = 1, files: tuple[int, ...] = ()) -> Iterator[tuple[RunnerEnd, Path]]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.sock"
        with RunnerEnd(path, told(world_size), files) as ear:
            yield ear, path


@contextlib.contextmanager
def peers(path: Path, count: int) -> Iterator[list[socket.socket]]:
    with contextlib.ExitStack() as stack:
        made = [stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)) for _ in range(count)]
        for peer in made:
            peer.connect(str(path))
            peer.setblocking(False)
        yield made


def listen(ear: RunnerEnd) -> None:
    """Serves all that has been sent so far."""
    while ready := ear.selector.select(0):
        for key, _ in ready:
            ear.handle(key.fileobj)


def say(ear: RunnerEnd, peer: socket.socket, *messages: dict[str, Any]) -> None:
    for message in messages:
        peer.send(json.dumps(message).encode())
        listen(ear)


# ---- anything at all

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.just(10**400) | st.just("nan"),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)
VERBS = st.sampled_from(["hello", "begin", "log", "finish", "saved"])
NEARLY = st.fixed_dictionaries({name: st.integers() | JSON for name in DONE}) | st.lists(JSON, min_size=3, max_size=3)
SPOKEN = st.builds(lambda verb, value: {verb: value}, VERBS, st.integers(-1, 3) | NEARLY | st.just(DONE) | JSON)
PACKETS = st.binary(max_size=200) | (SPOKEN | JSON).map(lambda value: json.dumps(value).encode())


@given(sent=st.lists(st.tuples(st.integers(0, 1), PACKETS | st.just(None)), max_size=12), begin_at=st.integers(0, 12))
@settings(max_examples=300, deadline=None)
def test_no_packet_brings_the_runner_down(sent: list[tuple[int, bytes | None]], begin_at: int) -> None:
    with runner_end(world_size=2) as (ear, path), peers(path, 2) as both:
        listen(ear)
        for number, (who, packet) in enumerate([(0, b'{"hello": 0}'), (1, b'{"hello": 1}'), *sent]):
            try:
                if packet is None:
                    both[who].close()
                else:
                    with contextlib.suppress(OSError):  # closed before
                        both[who].send(packet)
                listen(ear)
                if number == begin_at and ear.begun_at is None:
                    ear.begin()
            except Reject as reject:
                assert reject.status in ("invalid", "crash") and len(str(reject)) < 200
                break
        check(ear)


def check(ear: RunnerEnd) -> None:
    """What must hold whatever has been said."""
    assert not ear.saved or ear.finish is not None
    assert ear.finish is None or (ear.begun_at is not None and ear.finished_at is not None)
    assert ear.finish is None or ear.finished_at is None or ear.begun_at is None or ear.finished_at >= ear.begun_at
    assert not (ear.all_waiting and ear.begun_at is not None)
    for figure in (ear.step, ear.tokens, *(asdict(ear.finish).values() if ear.finish else ())):
        assert 0 <= float(figure) < math.inf


# ---- the legal orders, against a plain model of them

STEPS = st.sampled_from(["hello", "begin", "log", "finish", "saved", "hand over"])


@given(steps=st.lists(STEPS, max_size=14))
@settings(max_examples=200, deadline=None)
def test_the_runner_accepts_the_legal_orders_and_no_others(steps: list[str]) -> None:
    values: dict[str, Any] = {"hello": 0, "begin": 0, "log": [1, 2.0, 3], "finish": DONE, "saved": True}
    done: set[str] = set()
    with runner_end() as (ear, path), peers(path, 1) as (peer,):
        listen(ear)
        for step in steps:
            if step == "hand over":
                if ear.all_waiting:
                    ear.begin()
                    done.add(step)
                continue
            legal = {
                "hello": "hello" not in done,
                "begin": "hello" in done and "hand over" not in done,
                "log": "hello" in done,
                "finish": "hand over" in done and "finish" not in done,
                "saved": "finish" in done,
            }[step]
            if not legal:
                with pytest.raises(Reject, match=f"said '{step}' on its socket") as reject:
                    say(ear, peer, {step: values[step]})
                assert reject.value.status == "invalid"
                return
            say(ear, peer, {step: values[step]})
            done.add(step)
        assert ear.all_waiting == ("begin" in done and "hand over" not in done)
        assert (ear.begun_at is not None, ear.finish is not None, ear.saved) == tuple(
            step in done for step in ("hand over", "finish", "saved")
        )


def test_only_rank_0_may_log_and_finish_and_nobody_may_be_two() -> None:
    for verb, value in [("log", [1, 1.0, 1]), ("finish", DONE), ("saved", True), ("begin", 0), ("hello", 0)]:
        with runner_end(world_size=2) as (ear, path), peers(path, 2) as (first, second):
            listen(ear)
            say(ear, first, {"hello": 0})
            say(ear, second, {"hello": 1})
            ear.begin()
            with pytest.raises(Reject, match=f"said '{verb}'"):
                say(ear, second, {verb: value})


def test_a_connection_is_one_rank_for_good() -> None:
    with runner_end(world_size=2) as (ear, path), peers(path, 1) as (peer,):
        say(ear, peer, {"hello": 0})
        with pytest.raises(Reject, match="said 'hello'"):
            say(ear, peer, {"hello": 1})


@pytest.mark.parametrize("said", [["hello"], ["hello", "begin"]])
def test_a_rank_that_hangs_up_before_it_is_answered_is_forgotten(said: list[str], tmp_path: Path) -> None:
    (tmp_path / "data").touch()
    fd = os.open(tmp_path / "data", os.O_RDONLY)
    with runner_end(files=(fd,)) as (ear, path), peers(path, 1) as (peer,):
        listen(ear)
        if "begin" in said:
            say(ear, peer, {"hello": 0}, {"begin": 0})
            peer.close()
            assert ear.begin() > 0
        else:
            peer.send(b'{"hello": 0}')
            peer.close()
        listen(ear)
        assert len(ear.selector.get_map()) == 1  # the listener alone
    os.close(fd)


def test_a_connection_beyond_the_ranks_is_refused() -> None:
    with runner_end() as (ear, path), peers(path, 1):
        listen(ear)
        with (
            peers(path, 1),
            pytest.raises(Reject, match="opened more connections than it has ranks"),
        ):
            listen(ear)


@pytest.mark.parametrize(
    ("loss", "reason"),
    [
        ("NaN", "the loss is nan at step 7"),
        ("-Infinity", "the loss is -inf"),
        ("1e999", "the loss is inf"),
        (str(4.01 * math.log(300)), "the loss exploded to 22.9 at step 7"),
    ],
)
def test_a_loss_that_ends_the_run(loss: str, reason: str) -> None:
    with runner_end() as (ear, path), peers(path, 1) as (peer,):
        say(ear, peer, {"hello": 0}, {"log": [6, 3.99 * math.log(300), 60]})
        assert (ear.step, ear.tokens) == (6, 60)
        peer.send(b'{"log": [7, %s, 70]}' % loss.encode())
        with pytest.raises(Reject, match=reason) as reject:
            listen(ear)
        assert reject.value.status == "crash"


@pytest.mark.parametrize("change", [{"bytes": -1}, {"steps": 1 << 63}, {"flops_per_token": math.nan}, {"tokens": []}])
def test_a_finish_with_impossible_figures(change: dict[str, Any]) -> None:
    with runner_end() as (ear, path), peers(path, 1) as (peer,):
        say(ear, peer, {"hello": 0}, {"begin": 0})
        ear.begin()
        with pytest.raises(Reject, match="the run's finish message is malformed"):
            say(ear, peer, {"finish": DONE | change})


# ---- both ends together


@pytest.mark.parametrize("files", [1, MAX_FDS, MAX_FDS + 1])
def test_descriptors_and_the_clocks_zero_reach_every_rank(files: int, tmp_path: Path) -> None:
    (tmp_path / "data").write_bytes(b"tokens")
    fd = os.open(tmp_path / "data", os.O_RDONLY)
    heard: dict[int, tuple[float, list[int]]] = {}

    def rank(number: int) -> None:
        line = RankEnd(path, number)
        assert line.settings == told(2)
        heard[number] = line.begin()
        line._sock.close()

    with runner_end(2, (fd,) * files) as (ear, path):
        threads = [threading.Thread(target=rank, args=(number,)) for number in (0, 1)]
        for thread in threads:
            thread.start()
        while not ear.all_waiting:
            for key, _ in ear.selector.select(5):
                ear.handle(key.fileobj)
        zero = ear.begin()
        for thread in threads:
            thread.join(5)
    os.close(fd)
    for t0, fds in (heard[0], heard[1]):
        assert t0 == zero and len(fds) == files and os.pread(fds[-1], 9, 0) == b"tokens"
        for each in fds:
            os.close(each)


def test_a_folder_may_lie_deeper_than_an_address_is_long(tmp_path: Path) -> None:
    deep = tmp_path.joinpath(*["a-long-name-of-a-folder"] * 8)
    deep.mkdir(parents=True)
    with RunnerEnd(deep / "run.sock", told(), []) as ear:
        directory, name = short_path(deep / "run.sock")
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as peer:
            peer.connect(name)
            os.close(directory)
            listen(ear)
            say(ear, peer, {"hello": 0})
            assert json.loads(peer.recv(1 << 16)) == {"settings": asdict(told())}


def test_a_log_line_never_waits() -> None:
    with runner_end() as (ear, path):
        lines: list[RankEnd] = []
        thread = threading.Thread(target=lambda: lines.append(RankEnd(path, 0)))
        thread.start()
        while not lines:
            for key, _ in ear.selector.select(0.1):
                ear.handle(key.fileobj)
        thread.join(5)
        for step in range(100_000):  # far beyond what a socket holds, and nobody listens
            lines[0].log(step, 1.0, step)
        listen(ear)
        assert 0 < ear.step < 99_999
        lines[0]._sock.close()
