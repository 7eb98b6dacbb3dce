"""The night's git commands amid hooks, configuration, environment and layouts that could disturb them."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import repositories
from repositories import AT, BETTER, OTHER, TRAIN, git, keep, ledger, make, snapshot

from nightshift.branch import Branch
from nightshift.values import Stop

isolated = pytest.fixture(autouse=True)(repositories.isolated)
root = pytest.fixture(repositories.root)
branch = pytest.fixture(repositories.branch)


def test_hooks_signing_and_the_persons_configuration(root: Path, tmp_path: Path) -> None:
    marker = tmp_path / "hook-ran"
    for hook in ("pre-commit", "commit-msg", "post-commit", "post-merge", "post-checkout", "reference-transaction"):
        (root / ".git/hooks" / hook).write_text(f"#!/bin/sh\ntouch {marker}\nexit 1\n")
        (root / ".git/hooks" / hook).chmod(0o755)
    settings_ = {
        "user.useConfigOnly": "true",
        "commit.gpgSign": "true",
        "gpg.program": "false",
        "merge.verifySignatures": "true",
        "merge.ff": "false",
        "core.fsmonitor": f"touch {marker}",
        "core.splitIndex": "true",
        "log.showSignature": "true",
        "status.branch": "true",
        "status.showUntrackedFiles": "all",
        "color.ui": "always",
    }
    for key, value in settings_.items():
        git(root, "config", key, value)
    config = (root / ".git/config").read_bytes()
    branch = Branch(root, "nov20")
    base = branch.start()
    branch.candidate(1, branch.write_blob(BETTER), base, "better", AT)
    tip = keep(branch, BETTER)
    tip = branch.publish(ledger(root), "ledger", AT)
    branch.check(tip)
    plain = "-c", "core.hooksPath=/dev/null", "-c", "core.fsmonitor=false"
    git(root, *plain, "switch", "-q", "main")
    branch.resume(tip)
    assert (root / ".git/config").read_bytes() == config and not marker.exists()
    assert "gpgsig" not in git(root, *plain, "cat-file", "commit", tip)


def test_a_configured_identity_is_used(root: Path) -> None:
    git(root, "config", "user.name", "Ada Lovelace")
    branch = Branch(root, "nov20")
    commit = branch.candidate(1, branch.write_blob(BETTER), branch.start(), "better", AT)
    assert git(root, "log", "-1", "--format=%an <%ae>", commit) == "Ada Lovelace <nightshift@localhost>"
    assert git(root, "log", "-1", "--format=%cn <%ce>", commit) == "Ada Lovelace <nightshift@localhost>"
    git(root, "config", "user.email", "ada@example.org")
    commit = Branch(root, "nov20").candidate(1, branch.write_blob(BETTER), branch.head(), "better", AT)
    assert git(root, "log", "-1", "--format=%an <%ae>", commit) == "Ada Lovelace <ada@example.org>"


def test_git_variables_from_outside_change_nothing(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = make(tmp_path / "other")
    before = snapshot(other)
    outside = {
        "GIT_DIR": str(other / ".git"),
        "GIT_WORK_TREE": str(other),
        "GIT_INDEX_FILE": str(tmp_path / "index"),
        "GIT_OBJECT_DIRECTORY": str(tmp_path / "objects"),
        "GIT_AUTHOR_NAME": "Stranger",
        "GIT_AUTHOR_DATE": "@1 +0000",
        "GIT_EXTERNAL_DIFF": "false",
        "GIT_NAMESPACE": "elsewhere",
    }
    with monkeypatch.context() as patch:
        for name, value in outside.items():
            patch.setenv(name, value)
        branch = Branch(root, "nov20")
        branch.start()
        tip = keep(branch, BETTER)
        tip = branch.publish(ledger(root), "ledger", AT)
        branch.check(tip)
    assert snapshot(other) == before and not (tmp_path / "index").exists()
    assert git(root, "log", "-1", "--format=%an %at", tip) == "nightshift 1763600000"
    assert git(root, "status", "--porcelain") == ""


@pytest.mark.parametrize("attributes", ["", "* text=auto eol=crlf\n"])
def test_line_endings_do_not_change_the_bytes(root: Path, attributes: str) -> None:
    git(root, "config", "core.autocrlf", "true")
    (root / ".git/info/attributes").write_text(attributes)
    (root / "train.py").unlink()
    git(root, "checkout", "-q", "--", "train.py")
    assert b"\r\n" in (root / "train.py").read_bytes()
    branch = Branch(root, "nov20")
    assert branch.read_blob(branch.blob(branch.start())) == TRAIN.encode()
    commit = keep(branch, BETTER)
    assert branch.read_blob(branch.blob(commit)) == BETTER.encode()
    branch.check(commit)
    paths = ledger(root)
    tip = branch.publish(paths, "ledger", AT)
    for path in ("results.tsv", "experiments/nov20/1/run.log"):
        assert branch.read_blob(f"{tip}:{path}") == (root / path).read_bytes()
    branch.check(tip)
    assert git(root, "status", "--porcelain") == ""


def test_filters_do_not_change_the_bytes(branch: Branch, root: Path) -> None:
    git(root, "config", "filter.upper.clean", "tr a-z A-Z")
    (root / ".git/info/attributes").write_text("*.py filter=upper\n")
    text = "x = 1\r\ny = 2"
    commit = branch.candidate(1, branch.write_blob(text), branch.head(), "same", AT)
    assert branch.read_blob(branch.blob(commit)) == text.encode()


def test_a_linked_worktree(root: Path, tmp_path: Path) -> None:
    (root / "notes.md").write_text("in progress\n")
    git(root, "worktree", "add", "-q", str(tmp_path / "linked"), "-b", "side")
    linked = tmp_path / "linked"
    branch = Branch(linked, "nov20")
    branch.start()
    tip = keep(branch, BETTER)
    tip = branch.publish(ledger(linked), "ledger", AT)
    branch.check(tip)
    assert git(linked, "status", "--porcelain") == "" and git(root, "status", "--porcelain") == " M notes.md"
    assert (root / "train.py").read_text() == TRAIN and git(root, "symbolic-ref", "HEAD") == "refs/heads/main"
    lock = root / ".git/worktrees/linked/index.lock"
    lock.touch()
    os.utime(lock, (1, 1))
    with pytest.raises(Stop, match=str(lock)):
        branch.check(tip)


def test_train_py_in_a_folder_of_a_larger_repository(tmp_path: Path) -> None:
    top = make(tmp_path / "large")
    root = top / "research [v2]/night"
    root.mkdir(parents=True)
    (root / "train.py").write_text(TRAIN)
    git(top, "add", "-A")
    git(top, "commit", "-qm", "in a folder")
    (top / "train.py").write_text("the other train.py, being edited\n")
    branch = Branch(root, "nov20")
    base = branch.start()
    tip = keep(branch, BETTER)
    assert git(top, "diff", "--name-only", base, tip) == "research [v2]/night/train.py"
    tip = branch.publish(ledger(root), "ledger", AT)
    branch.check(tip)
    assert git(top, "status", "--porcelain") == " M train.py"
    patch = branch.diff(branch.blob(tip), branch.write_blob(OTHER)).encode()
    subprocess.run(["git", "apply", "-"], cwd=root, input=patch, check=True)
    assert (root / "train.py").read_text() == OTHER


def test_a_repository_with_sha256_hashes(tmp_path: Path) -> None:
    git(tmp_path, "init", "-q", "--object-format=sha256")
    make(tmp_path)
    branch = Branch(tmp_path, "nov20")
    assert len(branch.start()) == 64
    keep(branch, BETTER)
    tip = branch.publish(ledger(tmp_path), "ledger", AT)
    (tmp_path / "results.tsv").unlink()
    branch.check(branch.publish([Path("results.tsv")], "gone", AT))
    assert git(tmp_path, "status", "--porcelain") == "" and tip != branch.head()
