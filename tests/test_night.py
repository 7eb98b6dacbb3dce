"""Whole nights, for real: the loop as a process, the sandbox, the scorer, git; killed, and taken up again."""

from __future__ import annotations

import random
import time
from functools import partial
from pathlib import Path

import checkouts
import pytest
from checkouts import TAG, TRAIN, Loop, call
from repositories import git

from nightshift.config import Config
from nightshift.ledger import COLUMNS

pytestmark = pytest.mark.slow
KILLS = 10
RUN = ("run", "--profile", "tiny", "--tag", TAG)
IDEAS = {
    "001-learn-faster.py": TRAIN.replace("LR = 10.0", "LR = 60.0"),
    "002-not-python.py": TRAIN + "def broken(:\n",
    "003-a-seed-of-its-own.py": TRAIN.replace("model = Bigram", "torch.manual_seed(1)\n    model = Bigram", 1),
}


@pytest.fixture
def checkout(tmp_path: Path, tiny: Config) -> Path:
    root = checkouts.make(tmp_path / "checkout", tiny, claim_per_arm=4, max_experiments=3)
    for name, text in IDEAS.items():
        (root / "ideas").mkdir(exist_ok=True)
        (root / "ideas" / name).write_text(text)
    return root


def more_events(root: Path, than: int) -> bool:
    return len(checkouts.events(root)) > than


def gone(root: Path, within: float = 5.0) -> bool:
    """Whether every process of the checkout is gone, or goes within so many seconds."""
    deadline = time.monotonic() + within
    while checkouts.processes(root):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def test_a_night_killed_at_ten_random_moments_ends_as_if_it_had_not_been(checkout: Path, data_home: Path) -> None:
    dice = random.Random(20)
    args = (*RUN, "--proposer", "replay:ideas")
    for _ in range(KILLS):
        loop = Loop(checkout, data_home, *args)
        loop.until(partial(more_events, checkout, len(checkouts.events(checkout)) + 1))
        time.sleep(dice.uniform(0.0, 4.0))  # the random moment
        loop.kill()
        assert gone(checkout), checkouts.processes(checkout)
        if checkouts.state(checkout).over:
            break
    code, said = call(checkout, data_home, *args)
    assert code == 0 or checkouts.state(checkout).closed, said

    night = checkouts.state(checkout)
    assert [row.number for row in night.rows] == list(range(1, len(night.rows) + 1))
    counted = [row for row in night.rows if row.counts]  # a gain as large as this one's is measured twice
    assert [row.kind for row in counted] == ["baseline"] * 3 + ["candidate"] * 3 + ["claim"] * 8
    assert any(row.attempt > 1 for row in night.rows), "no kill came in the middle of a run"
    assert [row.status for row in counted[3:6]] == ["keep", "crash", "invalid"]
    assert "SyntaxError" in counted[4].reason
    assert night.claim is not None and night.claim["verdict"] == "better"
    assert git(checkout, "status", "--porcelain") == "?? ideas/"
    assert "LR = 60.0" in (checkout / "train.py").read_text()
    code, said = call(checkout, data_home, "verify")
    assert code == 0, said


def test_a_night_in_a_fresh_clone_verifies_and_its_results_come_back(checkout: Path, data_home: Path) -> None:
    code, said = call(checkout, data_home, *RUN, "--proposer", "replay:ideas", "--max-experiments", "1")
    assert code == 0, said
    clone = checkout.parent / "clone"
    git(checkout, "clone", "-q", "--single-branch", ".", str(clone))
    table = (clone / "results.tsv").read_text()
    (clone / "results.tsv").unlink()
    code, said = call(clone, data_home, "verify")
    assert code == 0, said
    assert (clone / "results.tsv").read_text() == table
    assert table.splitlines()[0].split("\t") == COLUMNS
    code, said = call(clone, data_home, "report")
    assert code == 0 and (clone / "progress.png").stat().st_size > 10_000, said


def test_ctrl_c_leaves_a_whole_ledger_and_the_night_goes_on(checkout: Path, data_home: Path) -> None:
    loop = Loop(checkout, data_home, *RUN, "--proposer", "knobs", "--max-experiments", "1")
    loop.until(lambda: checkouts.state(checkout).number == 2 and checkouts.state(checkout).running is not None)
    loop.process.send_signal(2)
    assert loop.wait(20) == 130, loop.said()
    assert f"next: python loop.py run --tag {TAG}" in loop.said()
    assert gone(checkout)
    assert (checkout / "experiments" / TAG / "journal.jsonl").exists()
    git(checkout, "clean", "-fdxq")  # what a person may do in the morning: the night is out of its reach
    code, said = call(checkout, data_home, "run")
    assert code == 0, said
    night = checkouts.state(checkout)
    assert night.closed and [row.attempt for row in night.rows[:4]] == [1, 2, 1, 1]
    assert call(checkout, data_home, "verify")[0] == 0
