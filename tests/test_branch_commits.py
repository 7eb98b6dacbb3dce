"""What a night commits, on real repositories: candidates, keeps, the ledger, and what a person is spared."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import repositories
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from repositories import AT, BETTER, OTHER, TRAIN, git, keep, ledger, make, snapshot

from nightshift.branch import Branch
from nightshift.values import Reject, Stop

isolated = pytest.fixture(autouse=True)(repositories.isolated)
root = pytest.fixture(repositories.root)
branch = pytest.fixture(repositories.branch)


# Candidates


def test_a_candidate_moves_nothing_that_a_person_sees(branch: Branch, root: Path) -> None:
    (root / "notes.md").write_text("in progress\n")
    git(root, "add", "notes.md")
    index, before = (root / ".git/index").read_bytes(), snapshot(root)
    tip = branch.head()
    blob = branch.write_blob(BETTER)
    commit = branch.candidate(7, blob, tip, "wider\n\nbecause", AT)
    assert branch.blob(commit) == blob and branch.read_blob(blob) == BETTER.encode()
    assert git(root, "rev-parse", "refs/nightshift/nov20/7") == commit
    assert git(root, "log", "-1", "--format=%P|%B|%an|%ae|%cn|%at|%ct", commit) == (
        f"{tip}|wider\n\nbecause\n|nightshift|nightshift@localhost|nightshift|1763600000|1763600000"
    )
    assert git(root, "diff", "--name-only", tip, commit) == "train.py"
    git(root, "update-ref", "-d", "refs/nightshift/nov20/7")
    assert snapshot(root) == before and (root / ".git/index").read_bytes() == index


def test_the_same_candidate_has_the_same_hash_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    branch = Branch(make(tmp_path / "one"), "nov20")
    parent = branch.start()
    blob = branch.write_blob(BETTER)
    first = branch.candidate(1, blob, parent, "wider", AT)
    assert branch.candidate(1, blob, parent, "wider", AT) == first
    assert branch.candidate(2, blob, parent, "wider", AT + 1) != first
    git(tmp_path, "clone", "-q", "one", "two")
    git(tmp_path / "two", "config", "i18n.commitEncoding", "ISO-8859-1")
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    clone = Branch(tmp_path / "two", "nov20")
    assert clone.write_blob(BETTER) == blob and clone.candidate(1, blob, parent, "wider", AT) == first


def test_hostile_text_becomes_a_message_and_nothing_else(branch: Branch, root: Path) -> None:
    parent = branch.head()
    blob = branch.write_blob(BETTER)
    hostile = ["--upload-pack=touch pwned", "-F/etc/passwd", "a\0b", "\xe9 \U0001f319", "", "\ud800", "`touch pwned`"]
    for message in hostile:
        commit = branch.candidate(1, blob, parent, message, AT)
        expected = message.replace("\0", " ").replace("\ud800", "?")
        assert git(root, "log", "-1", "--format=%B", commit).rstrip("\n") == expected
    assert not (root / "pwned").exists()
    with pytest.raises(Reject, match="UTF-8") as reject:
        branch.write_blob("x = '\ud800'\n")
    assert reject.value.status == "crash"


def test_the_file_mode_of_train_py_stays(root: Path) -> None:
    (root / "train.py").chmod(0o755)
    git(root, "commit", "-qam", "executable")
    branch = Branch(root, "nov20")
    branch.start()
    keep(branch, BETTER)
    assert git(root, "ls-tree", "HEAD", "train.py").startswith("100755 ")
    assert git(root, "status", "--porcelain") == ""


# Keeping and taking back


def test_a_keep_advances_branch_work_tree_and_index_once(branch: Branch, root: Path) -> None:
    base = branch.head()
    (root / "notes.md").write_text("in progress\n")
    (root / "staged.md").write_text("staged\n")
    git(root, "add", "staged.md")
    status = git(root, "status", "--porcelain")
    commit = keep(branch, BETTER)
    assert branch.head() == commit and (root / "train.py").read_text() == BETTER
    assert git(root, "status", "--porcelain") == status
    before = snapshot(root)
    branch.advance(commit, base)
    assert snapshot(root) == before
    branch.check(commit)


def test_a_revert_brings_the_earlier_train_py_back(branch: Branch, root: Path) -> None:
    base = branch.head()
    tip = keep(branch, BETTER)
    commit = branch.revert(branch.blob(base), tip, "take back: better", AT)
    branch.advance(commit, tip)
    assert (root / "train.py").read_text() == TRAIN and git(root, "diff", base, commit) == ""
    assert git(root, "log", "--format=%s") == "take back: better\nbetter\nstart"


def test_each_keep_cherry_picks_cleanly_on_main(branch: Branch, root: Path) -> None:
    texts = [BETTER, BETTER.replace("x10 = 10", "x10 = 1010"), BETTER.replace("x15 = 15", "x15 = 1515")]
    commits = [keep(branch, text, f"keep {i}") for i, text in enumerate(texts)]
    (root / "results.tsv").write_text("commit\n")
    branch.publish([Path("results.tsv")], "ledger", AT)
    git(root, "switch", "-q", "main")
    for commit, text in zip(commits, texts, strict=True):
        git(root, "cherry-pick", commit)
        assert (root / "train.py").read_text() == text and not (root / "results.tsv").exists()


@pytest.mark.parametrize("stage", [False, True])
def test_advance_leaves_a_persons_edit_byte_for_byte(branch: Branch, root: Path, stage: bool) -> None:
    tip = branch.head()
    commit = branch.keep(branch.write_blob(BETTER), tip, "better", AT)
    (root / "train.py").write_bytes(b"mine\r\n\x00")
    if stage:
        git(root, "add", "train.py")
    before = snapshot(root)
    git(root, "config", "merge.autoStash", "true")
    with pytest.raises(Stop, match="edits that are not committed"):
        branch.advance(commit, tip)
    assert snapshot(root) == before
    git(root, "stash", "push", "-q", "train.py")
    branch.advance(commit, tip)
    assert (root / "train.py").read_text() == BETTER


def test_advance_leaves_an_edit_that_is_hidden_from_git_status(branch: Branch, root: Path) -> None:
    tip = branch.head()
    commit = branch.keep(branch.write_blob(BETTER), tip, "better", AT)
    git(root, "update-index", "--assume-unchanged", "train.py")
    (root / "train.py").write_text("mine\n")
    with pytest.raises(Stop, match="would be overwritten by merge"):
        branch.advance(commit, tip)
    assert (root / "train.py").read_text() == "mine\n" and branch.head() == tip


def test_advance_refuses_another_branch(branch: Branch, root: Path) -> None:
    tip = branch.head()
    commit = branch.keep(branch.write_blob(BETTER), tip, "better", AT)
    git(root, "switch", "-q", "main")
    before = snapshot(root)
    with pytest.raises(Stop, match="HEAD is on main"):
        branch.advance(commit, tip)
    assert snapshot(root) == before


@pytest.mark.parametrize("index_too", [False, True])
def test_advance_finishes_what_a_kill_cut_off(branch: Branch, root: Path, index_too: bool) -> None:
    tip = branch.head()
    commit = branch.keep(branch.write_blob(BETTER), tip, "better", AT)
    (root / "train.py").write_text(BETTER)  # git writes the file, then the index, then the branch
    if index_too:
        git(root, "add", "train.py")
    assert branch.resume(tip, pending=commit) == tip
    branch.advance(commit, tip)
    assert branch.head() == commit and git(root, "status", "--porcelain") == ""
    assert branch.resume(tip, pending=commit) == commit


def test_an_edit_staged_under_the_keeps_own_text_is_a_persons(branch: Branch, root: Path) -> None:
    tip = branch.head()
    commit = branch.keep(branch.write_blob(BETTER), tip, "better", AT)
    (root / "train.py").write_text(OTHER)
    git(root, "add", "train.py")
    (root / "train.py").write_text(BETTER)
    before = snapshot(root)
    with pytest.raises(Stop, match="edits that are not committed"):
        branch.advance(commit, tip)
    assert snapshot(root) == before


# Publishing the ledger


def test_publish_commits_these_paths_and_leaves_the_rest(branch: Branch, root: Path) -> None:
    tip = keep(branch, BETTER)
    paths = ledger(root)
    (root / "notes.md").write_text("staged\n")
    (root / "new.md").write_text("staged\n")
    git(root, "add", "notes.md", "new.md")
    (root / "notes.md").write_text("and edited further\n")
    commit = branch.publish(paths, "ledger of nov20", AT)
    assert branch.head() == commit and git(root, "rev-parse", f"{commit}^") == tip
    assert git(root, "diff", "--name-only", tip, commit).split() == [
        "experiments/nov20/1/result.json",
        "experiments/nov20/1/run.log",
        "results.tsv",
    ]
    assert git(root, "status", "--porcelain") == "A  new.md\nMM notes.md"
    assert branch.read_blob(f"{commit}:experiments/nov20/1/run.log") == (paths[1] / "1/run.log").read_bytes()
    before = snapshot(root)
    assert branch.publish(paths, "ledger of nov20", AT + 60) == commit and snapshot(root) == before
    branch.check(commit)


def test_publish_follows_changes_and_deletions(branch: Branch, root: Path) -> None:
    paths = ledger(root)
    first = branch.publish(paths, "ledger", AT)
    (root / "results.tsv").write_text("commit\tval_bpb\nabc\t1.0\n")
    (root / "experiments/nov20/1/run.log").unlink()
    second = branch.publish(paths, "ledger", AT + 1)
    assert git(root, "diff", "--name-status", first, second) == "D\texperiments/nov20/1/run.log\nM\tresults.tsv"
    assert git(root, "status", "--porcelain") == ""


def test_publish_finishes_what_a_kill_cut_off_and_resume_knows_its_commit(branch: Branch, root: Path) -> None:
    tip = keep(branch, BETTER)
    paths = ledger(root)
    commit = branch.publish(paths, "ledger", AT)
    git(root, "reset", "-q", tip, "--", ".")  # as if cut off before the person's index followed
    assert git(root, "status", "--porcelain") != ""
    assert branch.resume(tip) == commit
    assert branch.publish(paths, "ledger", AT) == commit and git(root, "status", "--porcelain") == ""
    git(root, "commit", "-qm", "my own change", "--allow-empty")
    with pytest.raises(Stop, match="my own change"):
        branch.resume(tip)


def test_publish_from_another_branch_moves_the_nights_alone(branch: Branch, root: Path) -> None:
    git(root, "switch", "-q", "main")
    paths = ledger(root)
    main, index = branch.head(), git(root, "ls-files", "--stage")
    commit = branch.publish(paths, "ledger", AT)
    assert branch.head() == main and git(root, "ls-files", "--stage") == index
    assert git(root, "rev-parse", branch.name) == commit


def test_publish_of_what_is_not_there_commits_nothing(branch: Branch) -> None:
    assert branch.publish([Path("results.tsv"), Path("experiments/nov20")], "ledger", AT) == branch.head()


# Comparing


def test_diff_counts_and_merges(branch: Branch, root: Path) -> None:
    base, ours, theirs = (branch.write_blob(text) for text in (TRAIN, BETTER, OTHER))
    clash = branch.write_blob(TRAIN.replace("x3 = 3", "x3 = 333"))
    patch = branch.diff(base, ours)
    assert patch.startswith("--- a/train.py\n+++ b/train.py\n@@ -1,7 +1,7 @@\n") and "\n-x3 = 3\n+x3 = 33\n" in patch
    assert branch.diff(base, base) == "" and branch.net_added(base, base) == 0
    longer, shorter = branch.write_blob(TRAIN + "y = 1\nz = 2\n"), branch.write_blob(TRAIN[: TRAIN.index("x18")])
    assert branch.net_added(base, longer) == 2 and branch.net_added(base, shorter) == -2
    assert branch.merge3(base, ours, theirs) == BETTER.replace("x15 = 15", "x15 = 1515")
    assert branch.merge3(base, ours, clash) is None
    assert branch.merge3(base, ours, branch.write_blob("\0")) is None


lines = st.lists(st.sampled_from(["a = 1", "b = 2", "", "\tc", "@@ -1 +1 @@", "--- a/x", "caf\xe9", "d\r", "\x0c"]))
texts = st.builds(lambda body, end: "\n".join(body) + end, lines, st.sampled_from(["", "\n"]))


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Branch]:
    root = tmp_path_factory.mktemp("shared")
    git(root, "init", "-q")
    git(root, "config", "diff.noprefix", "true")
    git(root, "config", "diff.external", "false")
    git(root, "config", "color.ui", "always")
    (root / ".git/info/attributes").write_text("* -diff\n")
    yield Branch(root, "nov20")


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(old=texts, new=texts)
def test_a_diff_applies(shared: Branch, old: str, new: str) -> None:
    before, after = shared.write_blob(old), shared.write_blob(new)
    assert shared.read_blob(after) == new.encode()
    patch = shared.diff(before, after)
    assert bool(patch) == (old != new)
    changes = [line[:1] for line in patch.split("\n")[2:]]
    assert not patch or shared.net_added(before, after) == changes.count("+") - changes.count("-")
    file = shared.repo.root / "train.py"
    file.write_bytes(old.encode())
    if patch:
        subprocess.run(["git", "apply", "-"], cwd=shared.repo.root, input=patch.encode(), check=True)
    assert file.read_bytes() == new.encode()
