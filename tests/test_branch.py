"""A night's branch begins, goes on and is guarded, on real repositories."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import repositories
from repositories import AT, BETTER, OTHER, TRAIN, git, keep, snapshot

from nightshift.branch import Branch
from nightshift.plumbing import LOCK_PATIENCE_S
from nightshift.values import Stop

isolated = pytest.fixture(autouse=True)(repositories.isolated)
root = pytest.fixture(repositories.root)
branch = pytest.fixture(repositories.branch)


# Beginning a night


def test_start_creates_the_branch_and_moves_nothing_else(root: Path) -> None:
    (root / "notes.md").write_text("in progress\n")
    (root / "staged.md").write_text("staged\n")
    git(root, "add", "staged.md")
    (root / "untracked.md").write_text("untracked\n")
    index, status = (root / ".git/index").read_bytes(), git(root, "status", "--porcelain")
    branch = Branch(root, "nov20")
    assert not branch.exists()
    base = branch.start()
    assert branch.exists() and branch.name == "autoresearch/nov20"
    assert base == branch.head() == git(root, "rev-parse", "main")
    assert git(root, "symbolic-ref", "HEAD") == "refs/heads/autoresearch/nov20"
    assert (root / ".git/index").read_bytes() == index and git(root, "status", "--porcelain") == status


def test_start_from_a_detached_head(root: Path) -> None:
    git(root, "switch", "-q", "--detach")
    base = Branch(root, "nov20").start()
    assert git(root, "rev-parse", "autoresearch/nov20") == base == git(root, "rev-parse", "main")


@pytest.mark.parametrize("stage", [False, True])
def test_start_refuses_an_edited_train_py(root: Path, stage: bool) -> None:
    (root / "train.py").write_text(BETTER)
    if stage:
        git(root, "add", "train.py")
    before = snapshot(root)
    with pytest.raises(Stop, match=rf"\({'staged' if stage else 'not staged'}\).*git stash push train.py"):
        Branch(root, "nov20").start()
    assert snapshot(root) == before


def test_start_refuses_an_edit_that_is_staged_and_then_undone_in_the_work_tree(root: Path) -> None:
    (root / "train.py").write_text(BETTER)
    git(root, "add", "train.py")
    (root / "train.py").write_text(TRAIN)
    with pytest.raises(Stop, match=r"\(staged and not staged\)"):
        Branch(root, "nov20").start()


def test_start_refuses_a_train_py_that_is_not_committed_or_not_text(root: Path) -> None:
    git(root, "rm", "-q", "--cached", "train.py")
    git(root, "commit", "-qm", "gone")
    with pytest.raises(Stop, match="git add train.py"):
        Branch(root, "nov20").start()
    (root / "train.py").write_bytes(b"# caf\xe9\n")
    git(root, "add", "train.py")
    git(root, "commit", "-qm", "latin")
    with pytest.raises(Stop, match="not UTF-8"):
        Branch(root, "nov20").start()
    assert not Branch(root, "nov20").exists()


def test_start_refuses_where_there_is_no_commit_or_no_repository(tmp_path: Path) -> None:
    with pytest.raises(Stop, match="not a git repository"):
        Branch(tmp_path, "nov20").start()
    git(tmp_path, "init", "-q")
    with pytest.raises(Stop, match="no commit to start from"):
        Branch(tmp_path, "nov20").start()


def test_start_refuses_a_name_that_is_taken_or_that_git_does_not_take(root: Path) -> None:
    git(root, "branch", "autoresearch/nov20")
    git(root, "commit", "-qm", "later", "--allow-empty")
    before = snapshot(root)
    with pytest.raises(Stop, match=r"exists already.*--tag NAME"):
        Branch(root, "nov20").start()
    with pytest.raises(Stop, match="failed"):
        Branch(root, "a..b").start()
    assert snapshot(root) == before


def test_start_again_after_a_kill_between_branch_and_head(root: Path) -> None:
    git(root, "branch", "autoresearch/nov20")
    branch = Branch(root, "nov20")
    base = branch.start()
    before = snapshot(root)
    assert branch.start() == base and snapshot(root) == before
    assert git(root, "symbolic-ref", "HEAD") == "refs/heads/autoresearch/nov20"


def test_start_refuses_in_the_middle_of_a_merge(root: Path) -> None:
    git(root, "switch", "-qc", "side")
    (root / "notes.md").write_text("side\n")
    git(root, "commit", "-qam", "side")
    git(root, "switch", "-q", "main")
    git(root, "merge", "-q", "--no-ff", "--no-commit", "side")
    with pytest.raises(Stop, match="merge is in progress.*git merge --abort"):
        Branch(root, "nov20").start()
    assert git(root, "symbolic-ref", "HEAD") == "refs/heads/main"


# Going on with a night


def test_resume_switches_back_and_carries_other_edits_along(branch: Branch, root: Path) -> None:
    tip = keep(branch, BETTER)
    git(root, "switch", "-q", "main")
    (root / "notes.md").write_text("in progress\n")
    assert branch.resume(tip) == tip
    assert git(root, "symbolic-ref", "--short", "HEAD") == branch.name
    assert (root / "train.py").read_text() == BETTER and (root / "notes.md").read_text() == "in progress\n"
    before = snapshot(root)
    assert branch.resume(tip) == tip and snapshot(root) == before


def test_resume_refuses_where_git_or_an_edit_stands_in_the_way(branch: Branch, root: Path) -> None:
    tip = branch.head()
    git(root, "switch", "-qc", "side")
    (root / "notes.md").write_text("side\n")
    git(root, "commit", "-qam", "side")
    (root / "notes.md").write_text("in progress\n")
    before = snapshot(root)
    with pytest.raises(Stop, match="would be overwritten"):
        branch.resume(tip)
    assert snapshot(root) == before
    (root / "train.py").write_text(BETTER)
    with pytest.raises(Stop, match="edits that are not committed"):
        branch.resume(tip)
    assert (root / "train.py").read_text() == BETTER


def test_resume_refuses_a_detached_head(branch: Branch, root: Path) -> None:
    git(root, "switch", "-q", "--detach")
    with pytest.raises(Stop, match="detached.*git switch autoresearch/nov20"):
        branch.resume(branch.head())


def test_a_branch_that_is_gone_comes_back_by_the_command_in_the_message(branch: Branch, root: Path) -> None:
    tip = branch.head()
    git(root, "update-ref", "-d", "refs/heads/autoresearch/nov20")
    for step in (branch.check, branch.resume):
        with pytest.raises(Stop, match="is gone") as stop:
            step(tip)
    follow(root, stop.value)
    branch.check(tip)
    assert branch.resume(tip) == tip


def follow(root: Path, stop: Stop) -> None:
    """Runs the git commands that a message names."""
    for command in str(stop).split("`")[1::2]:
        if command.startswith("git "):
            git(root, *command.split()[1:])


def test_a_foreign_commit_is_listed_and_the_commands_in_the_message_part_it_from_the_night(
    branch: Branch, root: Path
) -> None:
    tip = keep(branch, BETTER)
    (root / "notes.md").write_text("mine\n")
    git(root, "commit", "-qam", "my own change")
    mine = branch.head()
    (root / "untracked.md").write_text("untracked\n")
    assert [line.split(" ", 1)[1] for line in branch.foreign(tip)] == ["my own change"]
    assert branch.foreign(mine) == []
    for step in (branch.check, branch.resume):
        with pytest.raises(Stop, match="my own change") as stop:
            step(tip)
    with pytest.raises(Stop, match="my own change"):
        branch.advance(branch.keep(branch.write_blob(OTHER), tip, "other", AT), tip)
    follow(root, stop.value)
    branch.check(tip)
    assert git(root, "rev-parse", "nov20-mine") == mine and (root / "untracked.md").exists()


def test_a_foreign_commit_seen_from_another_branch(branch: Branch, root: Path) -> None:
    tip = branch.head()
    git(root, "commit", "-qm", "my own change", "--allow-empty")
    git(root, "switch", "-q", "main")
    with pytest.raises(Stop, match="my own change") as stop:
        branch.resume(tip)
    assert git(root, "symbolic-ref", "HEAD") == "refs/heads/main"
    follow(root, stop.value)
    assert branch.resume(tip) == tip


def test_a_branch_that_was_moved_back_is_told_and_mended(branch: Branch, root: Path) -> None:
    base = branch.head()
    tip = keep(branch, BETTER)
    git(root, "reset", "-q", "--keep", base)
    with pytest.raises(Stop, match="was moved to") as stop:
        branch.check(tip)
    follow(root, stop.value)
    branch.check(tip)


@pytest.mark.parametrize("stage", [False, True])
def test_check_refuses_an_edited_train_py_and_a_moved_head(branch: Branch, root: Path, stage: bool) -> None:
    tip = branch.head()
    branch.check(tip)
    (root / "notes.md").write_text("in progress\n")
    branch.check(tip)
    (root / "train.py").write_text(BETTER)
    if stage:
        git(root, "add", "train.py")
    with pytest.raises(Stop, match="edits that are not committed") as stop:
        branch.check(tip)
    follow(root, stop.value)
    branch.check(tip)
    git(root, "switch", "-q", "main")
    with pytest.raises(Stop, match="HEAD is on main.*git switch autoresearch/nov20"):
        branch.check(tip)


def test_check_takes_a_fraction_of_a_second(branch: Branch) -> None:
    tip = branch.head()
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        branch.check(tip)
        times.append(time.perf_counter() - begin)
    assert min(times) < 0.05


# The index's lock


def test_a_stale_lock_stops_with_the_command_that_removes_it(branch: Branch, root: Path) -> None:
    tip = branch.head()
    commit = branch.keep(branch.write_blob(BETTER), tip, "better", AT)
    lock = root / ".git/index.lock"
    lock.touch()
    branch.check(tip)  # fresh: some git may be at work this very moment
    long_ago = time.time() - 10 * LOCK_PATIENCE_S
    os.utime(lock, (long_ago, long_ago))
    steps: list[Callable[[], object]] = [
        lambda: branch.check(tip),
        lambda: branch.resume(tip),
        lambda: branch.advance(commit, tip),
        lambda: branch.publish([Path("notes.md")], "ledger", AT),
        Branch(root, "other").start,
    ]
    for step in steps:
        with pytest.raises(Stop, match=f"`rm {lock}`"):
            step()
    assert lock.exists() and branch.head() == tip
    lock.unlink()
    branch.advance(commit, tip)


@pytest.mark.slow
def test_a_lock_that_an_open_commit_message_holds_is_not_called_stale(branch: Branch, root: Path) -> None:
    tip = branch.head()
    commit = branch.keep(branch.write_blob(BETTER), tip, "better", AT)
    lock = root / ".git/index.lock"
    (root / "notes.md").write_text("in progress\n")
    who = ["-c", "user.name=Person", "-c", "user.email=person@example.org", "-c", "core.editor=sleep 60 #"]
    person = subprocess.Popen(["git", *who, "commit", "-qa"], cwd=root, start_new_session=True)
    try:
        while not lock.exists():
            time.sleep(0.01)
        long_ago = time.time() - 10 * LOCK_PATIENCE_S
        os.utime(lock, (long_ago, long_ago))
        if sys.platform == "linux":
            branch.check(tip)
            with pytest.raises(Stop, match="Another git command holds"):
                branch.advance(commit, tip)
        assert branch.head() == tip
    finally:
        os.killpg(person.pid, 15)
        person.wait()


def test_advance_waits_for_a_lock_that_is_about_to_go(branch: Branch, root: Path) -> None:
    tip = branch.head()
    commit = branch.keep(branch.write_blob(BETTER), tip, "better", AT)
    lock = root / ".git/index.lock"
    lock.touch()
    other = subprocess.Popen(["sh", "-c", f"sleep 0.3; rm '{lock}'"])
    branch.advance(commit, tip)
    assert other.wait() == 0 and branch.head() == commit
