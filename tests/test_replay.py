"""The replay proposer on real folders, with patches made by git."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from nightshift import brief as briefs
from nightshift.config import load
from nightshift.proposers import make
from nightshift.proposers.replay import Replay
from nightshift.values import Brief, Past, Reject, Stop, Task

TRAIN = "".join(f"LINE_{n} = {n}\n" for n in range(12))


def brief(asked: int, train_py: str = TRAIN, history: tuple[Past, ...] = ()) -> Brief:
    return briefs.build(load(), Task("candidate", asked + 1), "", train_py, history, asked=asked)


def diff(folder: Path, old: str, new: str, *options: str, name: str = "train.py") -> str:
    """What `git diff` says when a committed file is edited."""
    folder.mkdir()
    git = ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run(["git", "init", "-q", str(folder)], check=True)
    (folder / name).write_text(old)
    subprocess.run([*git, "add", name], check=True)
    (folder / name).write_text(new)
    return subprocess.run([*git, "diff", *options], check=True, capture_output=True, text=True).stdout


@pytest.fixture
def queue(tmp_path: Path) -> Path:
    folder = tmp_path / "queue"
    folder.mkdir()
    return folder


@pytest.mark.parametrize("options", [[], ["--no-prefix"], ["-U1"]])
def test_a_patch_is_applied_to_the_incumbent_of_now(tmp_path: Path, queue: Path, options: list[str]) -> None:
    patch = diff(tmp_path / "repository", TRAIN, TRAIN.replace("LINE_6 = 6", "LINE_6 = 60"), *options)
    (queue / "010-sixty-not-six.patch").write_text(patch)
    moved = "# two lines\n# more\n" + TRAIN
    proposal = Replay(queue).propose(brief(0, moved))
    assert proposal is not None
    assert (proposal.title, proposal.proposer) == ("sixty not six", f"replay:{queue}")
    assert proposal.train_py == moved.replace("LINE_6 = 6", "LINE_6 = 60")


def test_files_come_in_name_order_and_end(queue: Path) -> None:
    for name in ("002-second.py", "001-first.py", "notes.md"):
        (queue / name).write_text(f"# {name}\r\nthis need not = = parse\n", newline="")
    replay = Replay(queue)
    first, second = replay.propose(brief(0)), replay.propose(brief(1))
    assert first is not None and second is not None
    assert [first.title, second.title] == ["first", "second"]
    assert first.train_py == "# 001-first.py\r\nthis need not = = parse\n"
    assert replay.propose(brief(2)) is None
    (queue / "003-added-in-the-night.py").write_text("")
    assert replay.propose(brief(2)) is not None


def test_what_other_proposers_took_does_not_count(queue: Path) -> None:
    (queue / "001-first.py").write_text("")
    by_knobs = tuple(Past(n, "candidate", "discard", "", "", "knobs", "", 1.0, 0.1) for n in range(3))
    assert Replay(queue).propose(brief(3, history=by_knobs)) is not None
    assert Replay(queue).propose(brief(4, history=by_knobs)) is None


def test_a_patch_that_does_not_apply_is_rejected_alone(tmp_path: Path, queue: Path) -> None:
    patch = diff(tmp_path / "a", TRAIN, TRAIN.replace("LINE_6 = 6", "LINE_6 = 60"))
    (queue / "001-stale.patch").write_text(patch)
    (queue / "002-other-file.patch").write_text(diff(tmp_path / "b", "a\n", "b\n", name="prepare.py"))
    both = patch + "--- /dev/null\n+++ b/helper.py\n@@ -0,0 +1 @@\n+x = 1\n"
    (queue / "0025-helper-too.patch").write_text(both)
    (queue / "003-no-patch.patch").write_text("not a patch\n")
    (queue / "004-deletes.patch").write_text(
        "--- a/train.py\n+++ /dev/null\n@@ -1,12 +0,0 @@\n" + "".join(f"-{line}\n" for line in TRAIN.splitlines()))
    (queue / "005-latin.py").write_bytes(b"# \xe4\n")
    (queue / "006-good.py").write_text("fine")
    replay, other = Replay(queue), TRAIN.replace("LINE_5", "LINE_FIVE")
    for asked, name in enumerate(["001-stale", "002-other", "0025-helper", "003-no-patch", "004-deletes", "005-latin"]):
        with pytest.raises(Reject, match=name) as caught:
            replay.propose(brief(asked, other if asked == 0 else TRAIN))
        assert caught.value.status == "invalid" and len(str(caught.value).splitlines()) == 1
    last = replay.propose(brief(6))
    assert last is not None and last.title == "good"


def test_a_patch_cannot_reach_out_of_its_folder(tmp_path: Path, queue: Path) -> None:
    (queue / "001-escape.patch").write_text("--- /dev/null\n+++ b/../escaped.py\n@@ -0,0 +1 @@\n+x = 1\n")
    with pytest.raises(Reject):
        Replay(queue).propose(brief(0))
    assert not (tmp_path / "escaped.py").exists()


def test_nothing_to_replay_is_wrong_usage(queue: Path) -> None:
    for folder, words in ((queue, "holds no .patch"), (queue / "missing", "there is no folder")):
        with pytest.raises(Stop, match=words) as caught:
            make(load(proposer=f"replay:{folder}"), "cpu", NoMoney())
        assert caught.value.code == 2


class NoMoney:
    """A budget for proposers that spend nothing."""

    def reserve(self, usd: float) -> None:
        raise AssertionError("replay and knobs spend nothing")

    def settle(self, call: str, usd: float, detail: dict[str, object]) -> None:
        raise AssertionError("replay and knobs spend nothing")


def test_make_chooses(monkeypatch: pytest.MonkeyPatch, queue: Path) -> None:
    (queue / "001-a.py").write_text("")
    monkeypatch.delenv("ANTHROPIC_API_KEY", raising=False)
    assert make(load(), "cpu", NoMoney()).name == "knobs"
    assert make(load(proposer=f"replay:{queue}"), "cpu", NoMoney()).name == f"replay:{queue}"
    monkeypatch.setenv("ANTHROPIC_API_KEY", "sk-test")
    chosen = make(load(), "cpu", NoMoney())
    assert (chosen.name, chosen.ahead) == ("anthropic", True)
    with pytest.raises(Stop, match="no proposer 'llama'") as caught:
        make(load(proposer="llama"), "cpu", NoMoney())
    assert caught.value.code == 2
