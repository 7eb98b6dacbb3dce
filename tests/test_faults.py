"""A night goes on as if nothing had happened: killed before each of its effects, filled disks, people who interfere.

The training is a throw of dice; ledger, branch, decisions and records are the real ones, in processes of their own.
"""

from __future__ import annotations

import os
import shutil
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import nights
import pytest
import repositories
from faults import full_at, in_a_process, kill_at
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nights import BAD, CRASH, GOOD, REFUSED, Idea
from repositories import git

from nightshift import ledger
from nightshift.ledger import State
from nightshift.verify import verify

isolated = pytest.fixture(autouse=True)(repositories.isolated)
RULES: dict[str, Any] = {"baselines": 2, "sentinel_every": 2, "claim_per_arm": 2}
IDEAS = [GOOD, BAD, CRASH, REFUSED, Idea("another x9", 9, "x9 = 99", -0.015)]
NIGHTS = int(os.environ.get("NIGHTS", "300"))
EVERY = 50  # of the effects, how many lie from one that the fast suite tries to the next


def made(folder: Path) -> Path:
    """A repository with a program.md, and a person's files in it: one that git knows, one that it does not."""
    folder.mkdir()
    (folder / "program.md").write_text("Try things.\n")
    repositories.make(folder)
    (folder / "thoughts.txt").write_text("mine\n")
    return folder


def play(root: Path, ideas: list[Idea] = IDEAS, seed: int = 0) -> None:
    nights.play(root, ideas, seed=seed, **RULES)


def told(root: Path) -> list[tuple[Any, ...]]:
    """The night's runs, by all that a fault must not change."""
    (state,) = ledger.nights(root)
    names = ("number", "kind", "status", "title", "blob", "parent", "arm", "score", "delta", "taken_back_by")
    return [tuple(getattr(row, name) for name in names) for row in state.rows]


def finished(root: Path, as_planned: list[tuple[Any, ...]]) -> None:
    """Asserts that the night is over, whole, and the same as without a fault; and a person's files what they were."""
    assert told(root) == as_planned
    assert (root / "thoughts.txt").read_text() == "mine\n"
    state: State = ledger.nights(root)[0]
    assert state.over and [row.number for row in state.rows] == list(range(1, len(state.rows) + 1))
    assert len({row.seed for row in state.rows}) == len(state.rows)
    lines = (root / "results.tsv").read_text().splitlines()
    assert len(lines) == 1 + len(state.rows)
    assert verify(root) == 0


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[tuple[Any, ...]], int, Path]:
    """The night that nothing happened to, how many effects it had, and the repository that it began in."""
    with pytest.MonkeyPatch.context() as patch:
        repositories.isolated(tmp_path_factory, patch)
        fresh = made(tmp_path_factory.mktemp("planned") / "fresh")
        root = Path(shutil.copytree(fresh, fresh.parent / "undisturbed"))
        status, effects = in_a_process(lambda: play(root), kill_at(0))
        assert status == 0
        rows = told(root)
    assert {row[1] for row in rows} == {"baseline", "candidate", "sentinel", "claim"}
    assert {row[2] for row in rows} == {"keep", "discard", "crash", "invalid"}
    return rows, effects, fresh


def killed_and_resumed(fresh: Path, folder: Path, effect: int, as_planned: list[tuple[Any, ...]]) -> None:
    root = Path(shutil.copytree(fresh, folder))
    status, _ = in_a_process(lambda: play(root), kill_at(effect))
    assert os.WIFSIGNALED(status), effect
    status, _ = in_a_process(lambda: play(root), kill_at(0))
    assert status == 0, effect
    assert told(root) == as_planned, effect
    status, _ = in_a_process(lambda: finished(root, as_planned), kill_at(0))
    assert status == 0, effect
    shutil.rmtree(root)


@pytest.mark.parametrize(
    "every", [pytest.param(EVERY, marks=pytest.mark.slow), pytest.param(1, marks=pytest.mark.long)]
)
def test_killed_before_any_of_its_effects_it_ends_the_same(
    planned: tuple[list[tuple[Any, ...]], int, Path], tmp_path: Path, every: int
) -> None:
    """SIGKILL before each effect on the disk that a whole night has: enumerated, not drawn."""
    as_planned, effects, fresh = planned
    assert effects > 300
    with ThreadPoolExecutor(2) as two:
        points = range(1, effects + 1, every)
        list(two.map(lambda n: killed_and_resumed(fresh, tmp_path / str(n), n, as_planned), points))


# ---- Random faults, one after the other

FAULTS = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(["kill", "full"]), st.integers(1, 700)),
        st.tuples(st.sampled_from(["edit", "commit", "brief", "lock", "switch"]), st.just(0)),
        st.tuples(st.just("clock"), st.sampled_from([-86_400, 86_400, 10**9])),
    ),
    min_size=1,
    max_size=4,
)


def leg(root: Path, seed: int, number: int = 0, clock: float = 0.0) -> int:
    """The night goes on until it ends, or is stopped; killed before effect `number`. The exit status."""

    def work() -> None:
        if clock:
            real = time.time
            time.time = lambda: real() + clock
        play(root, seed=seed)

    return in_a_process(work, kill_at(number))[0]


def suffer(root: Path, fault: str, number: int, seed: int) -> None:
    """Lets a fault happen to a night, and a leg of it; then does what the message of the stop says a person should."""
    branch = "autoresearch/nov20"
    if fault == "kill":
        leg(root, seed, number)
    elif fault == "full":
        in_a_process(lambda: play(root, seed=seed), full_at(number, root))
    elif fault == "clock":
        leg(root, seed, clock=number)
    elif fault == "brief":
        (root / "program.md").write_bytes(os.urandom(100))
        leg(root, seed)
    elif fault == "lock":
        (root / ".git/index.lock").touch()
        os.utime(root / ".git/index.lock", (0, 0))
        leg(root, seed)
        (root / ".git/index.lock").unlink()
    elif fault == "edit":
        mine = (root / "train.py").read_text() + "# mine\n"
        (root / "train.py").write_text(mine)
        leg(root, seed)
        assert (root / "train.py").read_text() == mine
        git(root, "checkout", "--", "train.py")
    elif branch in git(root, "branch", "--format=%(refname:short)").split() and fault == "switch":
        git(root, "switch", "-q", "main")
        leg(root, seed)
        git(root, "switch", "-q", branch)
    elif git(root, "branch", "--show-current").strip() == branch:  # a commit of somebody else's on it
        (root / "notes.txt").write_text("a note\n")
        git(root, "add", "notes.txt")
        git(root, "commit", "-qm", "a note")
        leg(root, seed)
        assert git(root, "log", "-1", "--format=%s", "--", "notes.txt").strip() == "a note"
        git(root, "reset", "--keep", "-q", "HEAD^")


@pytest.mark.long
@settings(max_examples=NIGHTS, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(faults=FAULTS)
def test_whatever_happens_to_it_no_run_is_lost_or_doubled(
    planned: tuple[list[tuple[Any, ...]], int, Path], tmp_path: Path, faults: list[tuple[str, int]]
) -> None:
    as_planned, _, fresh = planned
    root = Path(shutil.copytree(fresh, tmp_path / uuid.uuid4().hex))
    for fault, number in faults:
        suffer(root, fault, number, 0)
    assert leg(root, 0) == 0
    status, _ = in_a_process(lambda: finished(root, as_planned), kill_at(0))
    assert status == 0
    shutil.rmtree(root)
