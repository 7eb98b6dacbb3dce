"""Real runs, good and bad, in the real sandbox: the right status and reason, soon, and nothing left of them."""

from __future__ import annotations

import json
import os
import resource
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from runs import BIGRAM, SAVE, alive, bare, candidate, no_server, rejection, train

from nightshift import openrun, runner
from nightshift.data import read_shard_tokens
from nightshift.runner import Bench, Live
from nightshift.sandbox import Tier
from nightshift.scorer import Scorer

# ---- what fails before the first batch


@pytest.mark.parametrize(
    ("train_py", "reason"),
    [
        ("def load(weights, device): ...\nmain()\n", "NameError: name 'main' is not defined"),
        ("def main(:\n", "SyntaxError: invalid syntax"),
        ("import flash_attention_9\n", "No module named 'flash_attention_9'"),
        ("raise MemoryError\n", "MemoryError"),
        ("import os\nos.kill(os.getpid(), 11)\nos.abort()\n", "train.py ended before run.finish(), exit status"),
        ("print('nothing to do')\n", "exit status 0\nnothing to do"),
        ("raise SystemExit('x' * 100_000)\n", "exit status 1"),
    ],
)
def test_a_train_py_that_does_not_start_is_a_crash(
    bench: Bench, scorer: Scorer, tmp_path: Path, train_py: str, reason: str
) -> None:
    status, why, seconds = rejection(bench, scorer, tmp_path, train_py)
    assert status == "crash" and reason in why and why.startswith("train.py ended before run.finish()")
    assert seconds < 5 and len(why) < 20_000


def test_the_reason_ends_with_the_last_fifty_lines_of_the_log(bench: Bench, scorer: Scorer, tmp_path: Path) -> None:
    _, why, _ = rejection(bench, scorer, tmp_path, "for n in range(1000): print('line', n)\n")
    assert why.splitlines()[1:] == [f"line {n}" for n in range(950, 1000)]


def test_a_run_killed_for_memory_is_a_crash(bench: Bench, scorer: Scorer, tmp_path: Path) -> None:
    limit = "import resource; resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))\n"
    status, why, _ = rejection(bench, scorer, tmp_path, limit + "held = []\nwhile True: held.append(bytes(1 << 26))\n")
    assert status == "crash" and "MemoryError" in why


def test_a_hang_before_the_first_batch_is_a_timeout(bench: Bench, scorer: Scorer, tmp_path: Path) -> None:
    status, why, seconds = rejection(bench, scorer, tmp_path, "import time; time.sleep(60)\n", startup_s=1.0)
    assert status == "timeout" and why == "no batch was asked for within startup_s = 1 s" and 1 < seconds < 3


def test_a_model_server_that_hangs_at_import_is_named_in_the_timeout(
    bench: Bench, scorer: Scorer, tmp_path: Path
) -> None:
    hangs = "import time\nif __name__ == '__main__':\n" + "".join(
        f"    {line}\n" for line in bare("line.begin()").splitlines()
    )
    bench = replace(bench, config=replace(bench.config, startup_s=3.0))
    with (
        scorer.serve(candidate(tmp_path, hangs + "else: time.sleep(60)\n").folder / "train.py", tmp_path) as server,
        pytest.raises(Exception, match="train.py was not imported for scoring within startup_s = 3 s"),
    ):
        runner.train(candidate(tmp_path, hangs + "else: time.sleep(60)\n"), bench, server, lambda live: None)
    assert alive(str(tmp_path)) == []


# ---- what fails on the clock


@pytest.mark.parametrize(
    ("body", "status", "reason", "within_s"),
    [
        ("time.sleep(60)", "timeout", "trained for longer than its 1 s and 1.0 s of grace", 4),
        ("line.log(3, float('nan'), 9); time.sleep(60)", "crash", "the loss is nan at step 3", 2),
        ("line.log(3, float('inf'), 9); time.sleep(60)", "crash", "the loss is inf at step 3", 2),
        ("line.log(4, 4.1 * 5.71, 9); time.sleep(60)", "crash", "the loss exploded to 23.4 at step 4", 2),
        ("sys.exit(3)", "crash", "train.py ended before run.finish(), exit status 3", 2),
        ("os.kill(os.getpid(), 9)", "crash", "train.py ended before run.finish(), exit status", 2),
        ("finish(); time.sleep(60)", "timeout", "the weights were not saved within 1 s of run.finish()", 3),
        ("finish(); sys.exit()", "crash", "train.py ended before its weights were saved, exit status 0", 2),
        ("finish(); line.saved(); time.sleep(60)", "invalid", "weights are saved, and they are not there", 2),
        ("raw.shutdown(2); time.sleep(60)", "timeout", "trained for longer than", 4),
        ("raw.send(b'')\ntime.sleep(60)", "timeout", "trained for longer than", 4),
    ],
)
def test_a_run_that_fails_after_its_first_batch(
    bench: Bench,
    scorer: Scorer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    body: str,
    status: str,
    reason: str,
    within_s: float,
) -> None:
    monkeypatch.setattr(runner, "SAVE_SPARE_S", 1.0)
    found, why, seconds = rejection(bench, scorer, tmp_path, bare(f"line.begin()\n{body}"))
    assert found == status and reason in why and seconds < within_s


@pytest.mark.parametrize(
    ("save", "reason"),
    [
        ("weights.write_bytes(bytes(7))", "the weights file has 7 bytes, the run announced 8"),
        ("os.truncate(os.open(weights, os.O_CREAT | os.O_WRONLY), 9 + (16 << 20))", "the weights file has 16777225"),
        ("weights.symlink_to('/etc/passwd')", "the weights are not a regular file"),
        ("weights.mkdir()", "the weights are not a regular file"),
        ("os.mkfifo(weights)", "the weights are not a regular file"),
    ],
)
def test_weights_that_are_not_what_was_announced(
    bench: Bench, scorer: Scorer, tmp_path: Path, save: str, reason: str
) -> None:
    status, why, _ = rejection(bench, scorer, tmp_path, bare(f"line.begin(); finish(); {save}; line.saved()"))
    assert status == "invalid" and reason in why


def test_an_announced_size_cannot_buy_time(
    bench: Bench, scorer: Scorer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "SAVE_SPARE_S", 0.5)
    huge = bare("line.begin(); finish(size=10**15); time.sleep(60)")
    status, why, seconds = rejection(bench, scorer, tmp_path, huge, startup_s=2.0)
    assert status == "timeout" and "were not saved within 2 s" in why and seconds < 5


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("finish()", "said 'finish' on its socket where that makes no sense"),
        ("line.saved()", "said 'saved' on its socket"),
        ("raw.send(b'{\"begin\": 1}')", "said 'begin' on its socket"),
        ("raw.send(b'{\"hello\": 0}')", "said 'hello' on its socket"),
        ("RankEnd(Path(os.environ['NIGHTSHIFT_SOCKET']), 0)", "opened more connections than it has ranks"),
        ("raw.send(b'\\xff\\x00{')", "sent a malformed message"),
        ("raw.send(b'[' * 60_000)", "sent a malformed message"),
        ("raw.send(b'{\"log\": [0, 0, ' + b'9' * 60_000 + b']}')", "sent a malformed message"),
        ("raw.setsockopt(1, 7, 1 << 20); raw.send(bytes(100_000))", "sent a message of over 65536 bytes"),
        ("raw.send(json.dumps({'log': [0, 1.0, 10**400]}).encode())", "logged something that is not"),
        ('line.begin(); raw.send(b\'{"finish": {"bytes": -1}}\')', "finish message is malformed"),
        ("line.begin(); finish(steps=10**400)", "finish message is malformed"),
        ("line.begin(); finish(); finish()", "said 'finish' on its socket"),
    ],
)
def test_a_socket_that_is_misused_is_invalid(
    bench: Bench, scorer: Scorer, tmp_path: Path, body: str, reason: str
) -> None:
    status, why, seconds = rejection(bench, scorer, tmp_path, bare(body + "\ntime.sleep(60)"))
    assert status == "invalid" and reason in why and seconds < 3


def test_a_rank_that_hangs_up_at_once_does_not_end_the_night(bench: Bench, scorer: Scorer, tmp_path: Path) -> None:
    rude = """
    for verb in 20 * [b'{"hello": 0}']:
        other = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        raw.close()
        other.connect(os.environ["NIGHTSHIFT_SOCKET"])
        other.send(verb)
        other.close()
        time.sleep(0.01)
    """
    status, _, _ = rejection(bench, scorer, tmp_path, bare(rude))
    assert status in ("crash", "invalid")


# ---- what works


def test_a_run_is_measured_from_outside(bench: Bench, scorer: Scorer, tmp_path: Path) -> None:
    seen: list[Live] = []
    body = """
    time.sleep(0.4)
    t0, files = line.begin()
    assert len(files) == 3 and abs(time.monotonic() - t0) < 0.2
    held = bytearray(os.urandom(1 << 20)) * 80
    line.log(7, 2.5, 1000)
    time.sleep(0.6)
    finish(); weights.write_bytes(bytes(8)); line.saved(); time.sleep(60)
    """
    with no_server(scorer, tmp_path) as server:
        run = runner.train(candidate(tmp_path, bare(body)), bench, server, seen.append)
    assert run.startup_s > 0.4 and 0.6 < run.train_s < 1.2 and run.peak_memory_mb > 80
    assert run.steps == 1 and run.weights.read_bytes() == bytes(8) and alive(str(tmp_path)) == []
    phases = [live.phase for live in seen]
    assert phases == sorted(phases, key=["starting", "training", "saving"].index) and "training" in phases
    assert any((live.step, live.loss, live.tokens) == (7, 2.5, 1000) for live in seen)


def test_a_chatty_run_costs_the_loop_little(bench: Bench, scorer: Scorer, tmp_path: Path) -> None:
    body = """
    line.begin()
    for step in range(2000):
        line.log(step, 1.0, step)
        time.sleep(0.0004)
    finish(); weights.write_bytes(bytes(8)); line.saved(); time.sleep(60)
    """
    before = time.process_time()
    seen: list[Live] = []
    with no_server(scorer, tmp_path) as server:
        run = runner.train(candidate(tmp_path, bare(body)), bench, server, seen.append)
    assert len(seen) < 20 + 10 * run.train_s and time.process_time() - before < 0.5 * run.train_s


def test_descriptors_are_all_closed_after_a_run(bench: Bench, scorer: Scorer, tmp_path: Path) -> None:
    before = sorted(os.listdir("/proc/self/fd"))
    for number in range(3):
        rejection(bench, scorer, tmp_path / str(number), bare("line.begin(); sys.exit(1)"))
    assert len(os.listdir("/proc/self/fd")) == len(before)


@pytest.mark.slow
@pytest.mark.parametrize("tier", ["best", "no namespaces", "nothing"])
def test_train_and_score_in_every_tier(bench: Bench, tmp_path: Path, tier: str) -> None:
    tiers = {"best": bench.tier, "no namespaces": Tier(False, bench.tier.landlock), "nothing": Tier(False, 0)}
    bench = replace(bench, tier=tiers[tier], config=replace(bench.config, budget_steps=20))
    with Scorer(bench.config, bench.lease, bench.tier, tmp_path, bench.cache) as scorer:
        made = candidate(tmp_path / "1", BIGRAM)
        with scorer.serve(made.folder / "train.py", made.folder) as server:
            run = runner.train(made, bench, server, lambda live: None)
            score = server.score(run.weights, ("val", "test"))
    assert run.steps == 20 and run.tokens == 20 * 8 * 32 and run.num_params == 90_000
    assert set(score) == {"val", "test"} and all(0 < split.loss < np.log(300) * 1.5 for split in score.values())
    assert alive(str(tmp_path)) == []


CONTRACT = """
import json, math, time, torch, prepare
run = prepare.open_run(total_steps=10)
x, y = run.dummy_batch(3, 16)
assert x.shape == y.shape == (3, 16) and x.dtype == torch.int64 and torch.equal(x[:, 1:], y[:, :-1])
assert int(x.max()) < run.vocab_size == 300 and run.seq_len == 32 and run.objective == "time_to_target"
assert (run.seed, run.rank, run.world_size, run.total_steps, run.budget_s) == (5, 0, 1, 10, 1.0)
assert run.elapsed() == run.progress() == 0.0
told = {"dice": torch.rand(2).tolist(), "rows": []}
seen = []
for rows in (4, 8):  # a schedule of batch sizes asks again
    for number, (x, y) in enumerate(run.batches(rows, run.seq_len, per_step=rows // 4)):
        assert x.shape == y.shape == (rows, 32) and x.dtype == torch.int64 and torch.equal(x[:, 1:], y[:, :-1])
        told["rows"] += x.tolist()
        if number % (rows // 4) == 0:
            seen.append(run.progress())
        assert run.progress() == seen[-1]  # within a step it stays
        if rows == 4 and len(seen) == 4:
            break
assert seen == [step / 10 for step in range(10)] and run.elapsed() > 0, seen
model = torch.nn.Sequential(torch.nn.Linear(4, 4, bias=False), torch.nn.Linear(4, 4, bias=False))
model[1].weight = model[0].weight
open("told.json", "w").write(json.dumps(told))
run.finish(model)
time.sleep(60)
"""


@pytest.mark.slow
def test_the_trainers_contract(bench: Bench, scorer: Scorer, tmp_path: Path) -> None:
    """What train.py is promised, asserted by a train.py; two runs of one seed see the same."""
    told = []
    bench = replace(bench, config=replace(bench.config, objective="time_to_target"))
    for number in (1, 2):
        made = candidate(tmp_path / str(number), CONTRACT, seed=5)
        with no_server(scorer, made.folder) as server:
            run = runner.train(made, bench, server, lambda live: None)
        assert (run.steps, run.tokens, run.num_params) == (11, (4 * 4 + 6 * 2 * 8) * 32, 16)
        assert 64 < run.weights.stat().st_size < 300  # tied weights once
        told.append(json.loads((made.folder / "told.json").read_text()))
    assert told[0] == told[1]
    rows = [tuple(row) for row in told[0]["rows"]]
    shard = read_shard_tokens(bench.dataset.shards[0]).tolist()
    assert len(rows) == len(set(rows)) == 112
    assert set(rows) <= {tuple(shard[start : start + 32]) for start in range(0, len(shard) - 32, 32)}


RANKS = BIGRAM.replace(
    "    import prepare\n",
    """    import prepare, os
    torch.distributed.init_process_group("gloo")
    told = open("rank" + os.environ["RANK"], "w")
""",
).replace(
    "    run.finish(model)",
    """        told.write(f"{step} {run.progress()}\\n")
    told.close()
    torch.distributed.barrier()
    run.finish(model)""",
)


@pytest.mark.slow
@pytest.mark.parametrize("budget_steps", [None, 12])
def test_two_ranks_stop_at_the_same_step_and_see_the_same_progress(
    bench: Bench, scorer: Scorer, tmp_path: Path, budget_steps: int | None
) -> None:
    run = train(bench, scorer, tmp_path, RANKS, gpus=2, budget_steps=budget_steps, budget_s=1.5, startup_s=60.0)
    first, second = ((tmp_path / f"rank{rank}").read_text().splitlines() for rank in (0, 1))
    assert first == second
    assert len(first) == run.steps == (budget_steps or run.steps) and run.tokens == run.steps * 8 * 32 * 2
    assert alive(str(tmp_path)) == []
    if budget_steps is None:
        assert 1.4 < run.train_s < 3.5


def test_a_data_set_of_many_files_is_handed_over_whole(bench: Bench, scorer: Scorer, tmp_path: Path) -> None:
    """Also where the usual limit of 1024 open files stands in the way."""
    many = replace(bench.dataset, shards=bench.dataset.shards * 700, doc_starts=bench.dataset.doc_starts * 700)
    body = f"_, files = line.begin()\nassert len(files) == 1401\nfinish(); {SAVE}"
    usual, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if most < 2000:
        pytest.skip(f"this machine lets a process open {most} files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, most))
    try:
        assert train(replace(bench, dataset=many), scorer, tmp_path, bare(body)).steps == 1
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (usual, most))


def test_a_folder_that_is_taken_away_is_the_runs_own_fault(bench: Bench, scorer: Scorer, tmp_path: Path) -> None:
    (folder := tmp_path / "run").mkdir()
    body = "line.begin(); finish(); import shutil; shutil.rmtree(os.getcwd(), ignore_errors=True); line.saved()"
    status, _, _ = rejection(bench, scorer, folder, bare(body))
    assert status == "invalid"


def test_document_starts_are_read_without_the_offset_that_ranks_share(tmp_path: Path) -> None:
    np.save(tmp_path / "starts.npy", np.arange(9, dtype=np.uint32))
    fd = os.open(tmp_path / "starts.npy", os.O_RDONLY)
    os.lseek(fd, 77, os.SEEK_SET)  # where another rank has left it
    assert openrun._load_npy(fd).tolist() == list(range(9)) and os.lseek(fd, 0, os.SEEK_CUR) == 77
    os.close(fd)
