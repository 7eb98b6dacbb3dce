"""verify accepts what a night leaves behind, and notices every way in which that can be changed."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nights
import pytest
import repositories
from nights import BAD, CRASH, GOOD, REFUSED, Idea
from repositories import git

from nightshift import journal, ledger
from nightshift.branch import Branch
from nightshift.verify import blob_of, verify

SPARE = [Idea(f"nothing much {i}", i, f"x{i} = -{i}") for i in range(8, 18)]
ILL = Idea("on a hot GPU", 12, "x12 = 1212", unhealthy="GPU 0: thermal slowdown")
QUICKER = Idea("quicker", 13, "x13 = 1313", -0.02)
LUCKY = Idea("only lucky", 6, "x6 = 66", 0.0)

isolated = pytest.fixture(autouse=True)(repositories.isolated)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A night that kept, discarded, crashed, was refused, checked, claimed and published."""
    with pytest.MonkeyPatch.context() as patch:
        repositories.isolated(tmp_path_factory, patch)
        root = make(tmp_path_factory.mktemp("whole"))
        night = nights.play(root, [GOOD, BAD, CRASH, REFUSED, *SPARE], claim_per_arm=4)
    assert {r.kind for r in night.state.rows} == {"baseline", "candidate", "sentinel", "claim"}
    assert {r.status for r in night.state.rows} == {"keep", "discard", "crash", "invalid"}
    return root


@pytest.fixture
def root(whole: Path, tmp_path: Path) -> Path:
    """A copy of it, to be tampered with."""
    return Path(shutil.copytree(whole, tmp_path / "repo"))


def make(root: Path) -> Path:
    """A repository with a program.md beside its train.py."""
    root.mkdir(exist_ok=True)
    (root / "program.md").write_text("Try things.\n")
    return repositories.make(root)


def lines(root: Path, capsys: pytest.CaptureFixture[str], code: int) -> dict[str, str]:
    """What verify says, by check, and that it returns `code`."""
    capsys.readouterr()
    assert verify(root) == code
    told = capsys.readouterr().out
    found = [line.split(None, 2) for line in told.splitlines() if line.startswith("  ")]
    assert bool(code) == any(mark == "WRONG" for mark, *_ in found)
    return {check: f"{mark} {text}" for mark, check, text in found}


def live(root: Path) -> Path:
    return root / ".nightshift/nov20/journal.jsonl"


def published(root: Path, name: str = "journal.jsonl") -> Path:
    return root / "experiments/nov20" / name


def rewrite(root: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Edits events as somebody would who knows of the chain: every hash is made anew, in both copies."""
    for path in (live(root), published(root)):
        text, previous = b"", journal.FIRST
        for event in journal.parse(path.read_bytes())[0]:
            change(event)
            line = json.dumps(event | {"prev": previous}, ensure_ascii=False).encode()
            previous = hashlib.sha256(line).hexdigest()
            text += line + b"\n"
        path.write_bytes(text)


def of_run(number: int, name: str, **changes: Any) -> Callable[[dict[str, Any]], None]:
    """Changes the event `name` of a run."""

    def change(event: dict[str, Any]) -> None:
        if event["event"] == name and event.get("number") == number:
            event.update(changes)

    return change


# What holds


def test_a_whole_night_holds_within_a_second(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    began = time.monotonic()
    found = lines(root, capsys, 0)
    assert time.monotonic() - began < 5.0
    assert set(found) == {"journal", "published", "commits", "branch", "diffs", "records", "decisions", "results.tsv"}
    assert all(text.startswith("ok") for text in found.values())
    assert git(root, "status", "--porcelain") == ""


def test_a_clone_without_candidates_branch_and_live_journal_holds(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    git(root, "push", "-q", ".", "HEAD:refs/heads/elsewhere")
    clone = tmp_path / "clone"
    git(tmp_path, "clone", "-q", "--branch", "elsewhere", "--single-branch", "--no-local", str(root), str(clone))
    assert "refs/nightshift" not in git(clone, "for-each-ref")
    (clone / "results.tsv").unlink()
    found = lines(clone, capsys, 0)
    assert "commits are not in this clone" in found["commits"] and "no branch autoresearch/nov20" in found["branch"]
    assert "14 rebuild the train.py that ran" in found["diffs"] and found["decisions"].startswith("ok")
    assert "is rebuilt" in found["results.tsv"]
    assert (clone / "results.tsv").read_bytes() == (root / "results.tsv").read_bytes()


def test_a_remote_branch_serves_as_well(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clone = tmp_path / "clone"
    git(tmp_path, "clone", "-q", str(root), str(clone))
    git(clone, "switch", "-q", "--detach")
    git(clone, "branch", "-qD", "autoresearch/nov20")
    assert "7 moves lie on autoresearch/nov20" in lines(clone, capsys, 0)["branch"]


def test_files_without_git_are_checked_as_far_as_they_go(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(root / ".git")
    found = lines(root, capsys, 0)
    assert "no git repository" in found["commits"] and found["decisions"].startswith("ok")


def test_a_night_that_goes_on_holds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = make(tmp_path / "repo")
    nights.play(root, [GOOD, BAD, *SPARE], runs=6)
    found = lines(root, capsys, 0)
    assert "nothing is published" in found["published"] and "6 runs" in found["results.tsv"]


def test_a_keep_that_was_taken_back_holds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = make(tmp_path / "repo")
    night = nights.play(root, [LUCKY, BAD], seed=1, sentinel_every=1)  # a lucky draw, and a sentinel that finds out
    assert any(row.taken_back_by for row in night.state.rows)
    assert "2 moves lie on" in lines(root, capsys, 0)["branch"]  # the keep and its revert


def test_runs_that_did_not_count_hold(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = make(tmp_path / "repo")
    night = nights.play(root, [ILL, BAD], claim_per_arm=4)
    assert [row.counts for row in night.state.rows if row.kind == "candidate"] == [False, False, False, True, True]
    assert lines(root, capsys, 0)["decisions"].startswith("ok")
    rewrite(root, of_run(4, "decide", repeat_length=None))
    assert "WRONG run 4: status is discard, the rule gives" in lines(root, capsys, 1)["decisions"]


def test_a_night_to_a_target_holds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = make(tmp_path / "repo")
    rules = {"objective": "time_to_target", "baselines": 4, "sigma0": 1.0, "claim_per_arm": 4}
    night = nights.play(root, [QUICKER, BAD], **rules)
    assert any(row.length not in (0.97, 1.0, 1.03) for row in night.state.rows), "a run's length was aimed anew"
    assert lines(root, capsys, 0)["decisions"].startswith("ok")


def test_no_night_is_nothing_wrong_but_rows_without_a_night_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert verify(tmp_path) == 0 and "python loop.py run" in capsys.readouterr().out
    (tmp_path / "results.tsv").write_text("commit\n")
    assert verify(tmp_path) == 1 and (tmp_path / "results.tsv").read_text() == "commit\n"


# results.tsv is a view


def test_results_are_rebuilt_and_a_change_is_told(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = root / "results.tsv"
    true = results.read_text()
    results.unlink()
    assert "missing" in lines(root, capsys, 0)["results.tsv"] and results.read_text() == true
    results.write_text(true.replace("\tdiscard\t", "\tkeep\t", 1))
    assert "WRONG line 6 was not" in lines(root, capsys, 1)["results.tsv"] and results.read_text() == true
    results.write_text(true.rpartition("\n")[0].rpartition("\n")[0].rpartition("\n")[0] + "\n")
    assert "WRONG" in lines(root, capsys, 1)["results.tsv"] and results.read_text() == true


def test_a_kill_between_journal_and_view_is_no_fault(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = root / "results.tsv"
    true = results.read_text()
    results.write_text("\n".join(true.splitlines()[:-1]) + "\n")
    assert "was a run behind" in lines(root, capsys, 0)["results.tsv"] and results.read_text() == true


def test_two_nights_make_one_ledger(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nights.play(root, [BAD], tag="nov21")
    rows = [line.split("\t") for line in (root / "results.tsv").read_text().splitlines()[1:]]
    assert f"{len(rows)} runs of 2 nights, as" in lines(root, capsys, 0)["results.tsv"]
    assert {row[5] for row in rows} == {"nov20", "nov21"}


# Every way to change what was found


@pytest.mark.parametrize("line", [0, 7, -3])
def test_an_edited_journal_line(root: Path, capsys: pytest.CaptureFixture[str], line: int) -> None:
    text = live(root).read_text().splitlines()
    text[line] = text[line].replace('"at": 1', '"at": 2', 1)
    live(root).write_text("\n".join(text) + "\n")
    before = (root / "results.tsv").read_bytes()
    found = lines(root, capsys, 1)
    assert "does not follow" in found["journal"] and "left as it is" in found["results.tsv"]
    assert (root / "results.tsv").read_bytes() == before


def test_a_torn_last_line_is_no_fault(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with live(root).open("a") as file:
        file.write('{"n": 999, "at"')
    assert "cut off in writing" in lines(root, capsys, 0)["journal"]


def test_an_event_that_cannot_be_followed(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rewrite(root, lambda event: event.pop("scores", None) and event.pop("age"))
    assert "cannot be followed (KeyError: 'age')" in lines(root, capsys, 1)["journal"]


def test_a_published_journal_that_is_another(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = published(root)
    copy.write_text("\n".join(copy.read_text().splitlines()[1:]) + "\n")
    assert "one of the two was changed" in lines(root, capsys, 1)["published"]


def test_a_shortened_live_journal(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    live(root).write_text("\n".join(live(root).read_text().splitlines()[:20]) + "\n")
    assert "one of the two was changed" in lines(root, capsys, 1)["published"]


def test_a_better_score_and_its_whole_chain_anew(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rewrite(root, of_run(5, "decide", status="keep"))
    assert "WRONG run 5: status is keep, the rule gives discard" in lines(root, capsys, 1)["decisions"]


@pytest.mark.parametrize("changes", [{"delta": -0.5}, {"belief": {"m": 2.5, "s2": 1e-6}}, {"age": 0.0}, {"scores": {}}])
def test_any_figure_of_a_decision(root: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any]) -> None:
    rewrite(root, of_run(5, "decide", **changes))
    assert "WRONG run 5: " in lines(root, capsys, 1)["decisions"]


def test_a_seed_that_was_chosen(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rewrite(root, of_run(6, "start", seed=7))
    assert "run 6: seed is 7, the rule gives" in lines(root, capsys, 1)["decisions"]


def test_a_claim_that_was_improved(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rewrite(root, lambda event: event["event"] == "claim" and event["test"].update(high=-0.2))
    assert "WRONG the claim: test is" in lines(root, capsys, 1)["decisions"]


def test_a_commit_with_another_train_py(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = Branch(root, "nov20").write_blob("print('another')\n")
    rewrite(root, of_run(5, "start", blob=other))
    found = lines(root, capsys, 1)
    assert "WRONG run 5: commit" in found["commits"] and "WRONG run 5:" in found["diffs"]


def test_a_ref_that_was_moved(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    git(root, "update-ref", "refs/nightshift/nov20/5", "main")
    assert "WRONG run 5: its ref has train.py" in lines(root, capsys, 1)["commits"]


def test_a_keep_that_is_not_on_the_branch(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    git(root, "switch", "-q", "main")
    git(root, "branch", "-qf", "autoresearch/nov20", "main")
    assert "is not on autoresearch/nov20" in lines(root, capsys, 1)["branch"]


def test_a_keep_that_the_branch_has_not_reached_yet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = make(tmp_path / "repo")
    nights.play(root, [GOOD, *SPARE], runs=4)
    git(root, "reset", "-q", "--hard", "main")  # as a kill right before the move leaves it
    assert "1 moves lie on" in lines(root, capsys, 0)["branch"]


def test_a_keep_that_brought_another_file(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = ledger.nights(root)[0]
    kept = next(row for row in state.rows if row.kind == "candidate" and row.status == "keep")
    git(root, "switch", "-q", "--detach", kept.commit)
    (root / "notes.md").write_text("smuggled\n")
    git(root, "commit", "-qa", "--amend", "-m", "with notes")
    forged = git(root, "rev-parse", "HEAD")
    git(root, "switch", "-q", "autoresearch/nov20")
    git(root, "branch", "-f", "forged", forged)
    rewrite(root, of_run(kept.number, "decide", commit=forged, moves_to=forged))
    assert "changes notes.md, train.py, not train.py alone" in lines(root, capsys, 1)["branch"]


@pytest.mark.parametrize("change", [
    lambda text: text.replace("+x5 = 55", "+x5 = 56"),
    lambda text: text.replace(" x4 = 4", " x4 = 5"),
    lambda text: "",
    lambda text: "\udcff",
], ids=["another line", "another context", "nothing", "not text"])
def test_an_edited_diff(root: Path, capsys: pytest.CaptureFixture[str], change: Callable[[str], str]) -> None:
    path = published(root, "005/change.diff")
    path.write_bytes(change(path.read_text()).encode(errors="surrogateescape"))
    assert "does not give the train.py" in lines(root, capsys, 1)["diffs"]


@pytest.mark.parametrize("name, check", [("change.diff", "diffs"), ("result.json", "records")])
def test_a_missing_record(root: Path, capsys: pytest.CaptureFixture[str], name: str, check: str) -> None:
    published(root, f"005/{name}").unlink()
    assert f"WRONG run 5: {published(root, f'005/{name}')} is missing" in lines(root, capsys, 1)[check]


def test_an_edited_result(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = published(root, "005/result.json")
    stored = json.loads(path.read_text())
    path.write_text(json.dumps(stored | {"score": 2.0, "train_s": 1.0}))
    assert "differs from the journal in score, train_s" in lines(root, capsys, 1)["records"]
    path.write_text(json.dumps({"number": 5}))
    assert "is no record of a run" in lines(root, capsys, 1)["records"]


def test_blob_of_is_gits(root: Path) -> None:
    text = (root / "train.py").read_bytes()
    assert blob_of(text, "0" * 40) == git(root, "hash-object", "train.py")
