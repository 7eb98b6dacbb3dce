"""Real git repositories for tests, and git as the person runs it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from nightshift.branch import Branch

AT = 1763600000.25
TRAIN = "".join(f"x{i} = {i}\n" for i in range(20))
BETTER = TRAIN.replace("x3 = 3", "x3 = 33")
OTHER = TRAIN.replace("x15 = 15", "x15 = 1515")


def git(cwd: Path, *args: str, check: bool = True) -> str:
    """git as the person runs it."""
    who = ["-c", "user.name=Person", "-c", "user.email=person@example.org"]
    done = subprocess.run(["git", *who, *args], cwd=cwd, capture_output=True, text=True, check=False)
    assert not check or done.returncode == 0, done.stderr
    return done.stdout.rstrip("\n")


def isolated(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No configuration and no identity but what the repository itself has."""
    for name in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")


def make(root: Path) -> Path:
    """A repository with one commit of train.py and two more files."""
    root.mkdir(parents=True, exist_ok=True)
    git(root, "init", "-q", "-b", "main")
    (root / "train.py").write_text(TRAIN)
    (root / "notes.md").write_text("notes\n")
    (root / ".gitignore").write_text("*.log\n.nightshift/\n")
    git(root, "add", "-A")
    git(root, "commit", "-qm", "start")
    return root


def root(tmp_path: Path) -> Path:
    return make(tmp_path / "repo")


def branch(root: Path) -> Branch:
    """A night that has begun."""
    branch = Branch(root, "nov20")
    branch.start()
    return branch


def keep(branch: Branch, text: str, title: str = "better") -> str:
    """Keeps `text` on the branch as the loop does, and returns the new tip."""
    tip = branch.head()
    commit = branch.keep(branch.write_blob(text), tip, f"{title}\n\nhypothesis", AT)
    branch.advance(commit, tip)
    return commit


def snapshot(root: Path) -> tuple[object, ...]:
    """Everything that a person sees: HEAD, refs, index, status, and the bytes of the work tree."""
    files = sorted(path for path in root.rglob("*") if path.is_file() and ".git" not in path.parts)
    return (
        git(root, "symbolic-ref", "-q", "HEAD", check=False),
        git(root, "for-each-ref"),
        git(root, "ls-files", "--stage"),
        git(root, "status", "--porcelain"),
        [(path, path.read_bytes()) for path in files],
    )


def ledger(root: Path) -> list[Path]:
    """Writes what a night publishes, and returns its paths."""
    folder = root / "experiments/nov20/1"
    folder.mkdir(parents=True)
    (root / "results.tsv").write_text("commit\tval_bpb\n")
    (folder / "run.log").write_bytes(b"ignored by *.log, published all the same\r\n\xff")
    (folder / "result.json").write_text("{}\n")
    return [Path("results.tsv"), root / "experiments/nov20"]
