"""Scores against an independent computation, and models and model servers that misbehave."""

from __future__ import annotations

import contextlib
import json
import math
import mmap
import os
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import BIGRAM, alive, candidate
from safetensors.torch import save_file

from nightshift.modelserver import OK, STATUS
from nightshift.runner import Bench
from nightshift.scorer import Scorer
from nightshift.scoring import Scoring
from nightshift.tokenizer import Tokenizer
from nightshift.values import Reject, SplitScore, Stop

VOCAB = 300
FORWARD = "        return self.table(tokens)"
LOAD = "    return model.to(device)"


@pytest.fixture(scope="module")
def table() -> torch.Tensor:
    return 3 * torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(1))


def score(
    scorer: Scorer, folder: Path, table: torch.Tensor, train_py: str, splits: tuple[str, ...] = ("val",)
) -> dict[str, SplitScore]:
    """Scores `table` as the weights of train_py, in the real processes."""
    made = candidate(folder, train_py)
    save_file({"table.weight": table}, folder / "weights.safetensors")
    with scorer.serve(made.folder / "train.py", folder) as server:
        while not server.ready:
            time.sleep(0.02)
        return server.score(folder / "weights.safetensors", splits)


def expected(bench: Bench, table: torch.Tensor, split: str) -> tuple[float, int, int, np.ndarray]:
    """Nats, bytes, tokens and the nats of every token: in float64, token by token's own bytes, without our scorer."""
    words = Tokenizer.load(bench.dataset.root / "tokenizer.json")
    lengths = np.array([0 if n == words.bos_id else len(words.encoding.decode_bytes([n])) for n in range(VOCAB)])
    rows = np.load(bench.dataset.root / f"{split}.npy").astype(np.int64)
    logits = table.double().numpy()
    surprise = np.log(np.exp(logits).sum(1))[:, None] - logits
    nats = surprise[rows[:, :-1], rows[:, 1:]]
    told = lengths[rows[:, 1:]]
    return float(nats[told > 0].sum()), int(told.sum()), int((told > 0).sum()), nats


@pytest.mark.slow
def test_a_score_is_what_float64_says(bench: Bench, scorer: Scorer, tmp_path: Path, table: torch.Tensor) -> None:
    scores = score(scorer, tmp_path, table, BIGRAM, ("val", "test"))
    for split in ("val", "test"):
        nats, size, count, each = expected(bench, table, split)
        assert scores[split].nats == pytest.approx(nats, rel=1e-6)
        assert (scores[split].bytes, scores[split].tokens) == (size, count) and 0 < count < each.size
        assert scores[split].bpb == pytest.approx(nats / math.log(2) / size, rel=1e-6)
        assert scores[split].loss == pytest.approx(nats / count, rel=1e-6)
        np.testing.assert_allclose(np.load(tmp_path / f"nats-{split}.npy"), each, rtol=1e-4, atol=1e-4)
    assert scores["val"] != scores["test"] and alive(str(tmp_path)) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("old", "new", "status", "reason"),
    [
        (FORWARD, FORWARD + "[:, :-1]", "invalid", "the logits have shape [64, 31, 300], expected up to [64, 32, 300]"),
        (FORWARD, FORWARD + "[..., :299]", "invalid", "the logits have shape [64, 32, 299]"),
        (FORWARD, FORWARD + ".sum(-1)", "invalid", "the logits have shape [64, 32]"),
        (FORWARD, FORWARD + " * (tokens != tokens[0, 0])[..., None].log()", "invalid", "NaN or infinity in the logits"),
        (FORWARD, FORWARD + ".log()", "invalid", "there is NaN or infinity in the logits"),
        (FORWARD, "        raise ArithmeticError('no sum')", "crash", "ArithmeticError: no sum"),
        (FORWARD, "        import os; os._exit(0)", "crash", "the model server died"),
        (LOAD, "    raise KeyError('table.wait')", "crash", "KeyError: 'table.wait'"),
        (LOAD, "    model.row_len = 16; return model", "invalid", "asked for rows of 16 tokens; a row has 32"),
        ("def load(", "def unload(", "crash", "module 'train' has no attribute 'load'"),
        ("import torch\n", "import torch, no_such_thing\n", "crash", "No module named 'no_such_thing'"),
    ],
)
def test_a_model_that_cannot_be_scored(
    scorer: Scorer, tmp_path: Path, table: torch.Tensor, old: str, new: str, status: str, reason: str
) -> None:
    assert BIGRAM.count(old) == 1
    with pytest.raises(Reject) as reject:
        score(scorer, tmp_path, table, BIGRAM.replace(old, new))
    assert reject.value.status == status and reason in str(reject.value)
    assert alive(str(tmp_path)) == []


@pytest.mark.slow
def test_the_scorer_goes_on_after_a_model_that_dies_or_hangs(bench: Bench, tmp_path: Path, table: torch.Tensor) -> None:
    config = replace(bench.config, startup_s=2.0)
    with Scorer(config, bench.lease, bench.tier, tmp_path, bench.cache) as scorer:
        for number, what in enumerate(["import time; time.sleep(60)", "import os; os.kill(os.getpid(), 9)"]):
            started = time.monotonic()
            with pytest.raises(Reject) as reject:
                score(scorer, tmp_path / str(number), table, BIGRAM.replace(FORWARD, f"        {what}"))
            assert reject.value.status == ("timeout", "crash")[number] and time.monotonic() - started < 10
        again = score(scorer, tmp_path / "again", table, BIGRAM)["val"]
    assert again.nats == pytest.approx(expected(bench, table, "val")[0], rel=1e-6)
    assert alive(str(tmp_path)) == []


@pytest.mark.slow
def test_a_scorer_that_dies_stops_the_night(bench: Bench, tmp_path: Path, table: torch.Tensor) -> None:
    with Scorer(bench.config, bench.lease, bench.tier, tmp_path, bench.cache) as scorer:
        os.kill(scorer._process.pid, signal.SIGKILL)
        with pytest.raises(Stop, match=r"the scorer has died or hangs; (.|\n)*scorer.log(.|\n)*python loop.py run"):
            score(scorer, tmp_path / "run", table, BIGRAM)
    assert alive(str(tmp_path)) == []


SPY = """
    import json, os
    found = {}
    for path in PATHS:
        try:
            found[path] = repr(open(path, "rb").read(1))
        except OSError as error:
            found[path] = type(error).__name__
    found["key"] = os.environ.get("ANTHROPIC_API_KEY", "none")
    raise RuntimeError(json.dumps(found))
"""


def test_the_model_server_reaches_neither_the_held_out_rows_nor_keys(
    bench: Bench, scorer: Scorer, tmp_path: Path, table: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not bench.tier.landlock:
        pytest.skip(f"this machine offers {bench.tier}")
    monkeypatch.setenv("ANTHROPIC_API_KEY", "secret")
    (tmp_path / "journal.jsonl").write_text("the truth")
    paths = [*map(str, bench.dataset.root.iterdir()), "../journal.jsonl", str(scorer.log)]
    with pytest.raises(Reject) as reject:
        score(scorer, tmp_path / "run", table, BIGRAM.replace(LOAD, SPY.replace("PATHS", repr(paths))))
    found = json.loads(str(reject.value).rpartition("RuntimeError: ")[2])
    assert found.pop("key") == "none" and len(found) == len(paths)
    assert set(found.values()) <= {"PermissionError", "FileNotFoundError"}


# ---- the trusted half alone, with a model server that speaks its protocol badly


@pytest.fixture
def scoring(bench: Bench) -> Iterator[Scoring]:
    scoring = Scoring({"config": asdict(bench.config), "device": "cpu"})
    yield scoring
    for fd in scoring.buffers.fds if scoring.buffers else []:
        os.close(fd)


@contextmanager
def model_server(talk: Callable[[socket.socket], None]) -> Iterator[socket.socket]:
    """The scorer's end of a connection whose other end `talk` serves, in a thread."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    def serve() -> None:
        with theirs:
            theirs.recv(1 << 16)  # the request
            with contextlib.suppress(ConnectionError):
                talk(theirs)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield ours
    finally:
        ours.close()
        thread.join(10)


def refusal(scoring: Scoring, folder: Path, talk: Callable[[socket.socket], None]) -> tuple[str, str]:
    """What becomes of a scoring with that model server."""
    with model_server(talk) as server:
        try:
            scoring.score(server, folder, "weights", ["val"])
        except Reject as reject:
            return reject.status, str(reject)
        except ConnectionError:
            return "crash", "the model server died"  # as scoring.main says it
    raise AssertionError("it was scored")


def buffers(peer: socket.socket, row_len: int = 32) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """What an honest server does first: says its row length, and maps tokens and logits."""
    peer.send(STATUS.pack(OK, row_len, 0, 0))
    message, fds, _, _ = socket.recv_fds(peer, 1 << 16, 2)
    shape = json.loads(message)
    tokens, logits = (np.frombuffer(mmap.mmap(fd, 0), dtype) for fd, dtype in zip(fds, "qf", strict=True))
    shaped = logits.reshape(shape["rows"], shape["row_len"], shape["vocab"])
    return tokens.reshape(shape["rows"], shape["row_len"]), shaped, fds


@pytest.mark.parametrize(
    ("said", "status", "reason"),
    [
        (b"", "crash", "the model server died"),
        (b"x", "crash", "the model server died"),
        (bytes(4096), "crash", "the model server died"),
        (STATUS.pack(-7, 0, 0, 0), "crash", "the model server said -7"),
        (STATUS.pack(OK, 0, 0, 0), "invalid", "asked for rows of 0 tokens"),
        (STATUS.pack(OK, -32, 0, 0), "invalid", "asked for rows of -32 tokens"),
        (STATUS.pack(OK, 2**62, 0, 0), "invalid", "asked for rows of 4611686018427387904 tokens"),
    ],
)
@pytest.mark.parametrize("objective", ["val_bpb", "time_to_target"])
def test_a_first_word_that_makes_no_sense(
    scoring: Scoring, tmp_path: Path, said: bytes, status: str, reason: str, objective: str
) -> None:
    scoring.consecutive = objective == "time_to_target"
    found, why = refusal(scoring, tmp_path, lambda peer: (peer.send(said) if said else 0, None)[1])
    assert found == status and reason in why


def test_silence_and_delay_are_timeouts(scoring: Scoring, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scoring.patience_s = 0.3
    started = time.monotonic()
    assert refusal(scoring, tmp_path, lambda peer: time.sleep(1))[0] == "timeout"

    def dawdle(peer: socket.socket) -> None:
        _, logits, _ = buffers(peer)
        while peer.recv(4):
            time.sleep(0.2)
            logits[:] = 0
            peer.send(STATUS.pack(OK, 0, 0, 0))

    monkeypatch.setattr("nightshift.scoring.LOGITS_BYTES", {"cpu": 8 * 32 * VOCAB * 4})  # 64 rows, 8 at a time
    assert refusal(scoring, tmp_path, dawdle)[0] == "timeout"
    assert time.monotonic() - started < 3


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (None, "NaN or infinity"),  # acknowledged, and nothing written
        (math.inf, "NaN or infinity"),
        (-math.inf, "NaN or infinity"),
        ([3.4e38, -3.4e38] * (VOCAB // 2), "a loss is infinite in float32"),
    ],
)
def test_logits_that_are_no_numbers(
    scoring: Scoring, tmp_path: Path, value: float | list[float] | None, reason: str
) -> None:
    def answer(peer: socket.socket) -> None:
        _, logits, _ = buffers(peer)
        peer.recv(4)
        if value is not None:
            logits[:] = 0
            logits[-1, -1] = value
            logits[0] = value
        peer.send(STATUS.pack(OK, 0, 0, 0))
        peer.recv(4)

    status, why = refusal(scoring, tmp_path, answer)
    assert status == "invalid" and reason in why
    assert refusal(scoring, tmp_path, lambda peer: (buffers(peer), None)[1])[0] == "crash"  # no logits of the last run


def test_a_server_that_writes_on_while_it_is_scored_gains_nothing(scoring: Scoring, tmp_path: Path) -> None:
    """Raised between the softmax's denominator and the target's logit, logits would make a loss negative."""
    done = threading.Event()

    def flicker(peer: socket.socket) -> None:
        _, logits, _ = buffers(peer)
        peer.recv(4)
        logits[:] = 0
        peer.send(STATUS.pack(OK, 0, 0, 0))
        while not done.is_set():
            logits[:] = 0
            logits[:] = 100

    for number in range(20):
        with model_server(flicker) as server:
            folder = tmp_path / str(number)
            folder.mkdir()
            scoring.score(server, folder, "weights", ["val"])
            done.set()
        done.clear()
        assert np.load(folder / "nats-val.npy").min() > -1e-3


def test_the_buffers_cannot_be_cut_short(scoring: Scoring, tmp_path: Path) -> None:
    refused = []

    def cut(peer: socket.socket) -> None:
        _, logits, fds = buffers(peer)
        for fd in fds:
            try:
                os.ftruncate(fd, 0)
            except PermissionError:
                refused.append(fd)
        peer.recv(4)
        logits[:] = 0
        peer.send(STATUS.pack(OK, 0, 0, 0))

    with model_server(cut) as server:
        assert scoring.score(server, tmp_path, "weights", ["val"])["val"]["nats"] > 0
    assert len(refused) == 2


@pytest.mark.parametrize("what", ["link", "folder"])
def test_the_scorer_writes_through_no_link_that_a_run_has_left(scoring: Scoring, tmp_path: Path, what: str) -> None:
    journal = tmp_path / "journal.jsonl"
    journal.write_text("the truth")
    (tmp_path / "run").mkdir()
    path = tmp_path / "run" / "nats-val.npy"
    path.symlink_to(journal) if what == "link" else path.mkdir()

    def uniform(peer: socket.socket) -> None:
        _, logits, _ = buffers(peer)
        peer.recv(4)
        logits[:] = 0
        peer.send(STATUS.pack(OK, 0, 0, 0))

    if what == "folder":
        assert refusal(scoring, tmp_path / "run", uniform)[0] == "invalid"
    else:
        with model_server(uniform) as server:
            sums = scoring.score(server, tmp_path / "run", "weights", ["val"])["val"]
        assert SplitScore(**sums).loss == pytest.approx(math.log(VOCAB), rel=1e-5)
        assert not path.is_symlink() and np.load(path).size == 2048
    assert journal.read_text() == "the truth"


def test_a_time_to_target_model_may_choose_its_rows(scoring: Scoring, tmp_path: Path) -> None:
    """And every token of the text is scored once, special ones too."""
    scoring.consecutive = True
    seen: list[np.ndarray] = []

    def uniform(peer: socket.socket) -> None:
        tokens, logits, _ = buffers(peer, row_len=128)
        while order := peer.recv(4):
            (rows,) = struct.unpack("<i", order)
            seen.append(tokens[:rows].copy())
            logits[:] = 0
            peer.send(STATUS.pack(OK, 0, 0, 0))

    with model_server(uniform) as server:
        sums = scoring.score(server, tmp_path, "weights", ["val"])["val"]
    packed = scoring.dataset.rows("val")
    assert np.concatenate(seen).reshape(-1).tolist() == packed[:, :-1].reshape(-1).tolist()
    assert sums["tokens"] == 2048 and sums["nats"] == pytest.approx(2048 * math.log(VOCAB), rel=1e-5)
    assert sums["bytes"] < scoring.token_bytes[torch.from_numpy(packed[:, 1:].astype(np.int64))].sum() + 100
