"""Which night a command means, and what a new one takes over from those before it."""

from __future__ import annotations

import datetime
import os
from pathlib import Path

import pytest
import repositories
from repositories import git
from simulated import begin, demo, play, scored

from nightshift import decide, ledger
from nightshift.branch import Branch
from nightshift.config import Config
from nightshift.data import Dataset
from nightshift.devices import Lease
from nightshift.journal import Journal
from nightshift.night import Ledger
from nightshift.opening import choose_tag, take_up
from nightshift.runner import Bench
from nightshift.sandbox import Tier
from nightshift.values import Stop

pytestmark = pytest.mark.usefixtures("isolated")
TODAY = datetime.date.today().strftime("%b%d").lower()


@pytest.fixture
def isolated(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    repositories.isolated(tmp_path_factory, monkeypatch)


def begun(root: Path, tag: str, *events: str, home: str = ".nightshift") -> Ledger:
    """A night on disk; `events` that end it."""
    book = Ledger(Journal(root / home / tag / "journal.jsonl"))
    begin(book, tag=tag)
    if "claim" in events:
        book.write("claim", verdict="no keep, no claim", why="")
    if "stop" in events:
        book.write("stop", code=0, cause="", moves_to="")
    return book


def bench(config: Config, digest: str = "d1", device: str = "a CPU") -> Bench:
    data = Dataset(Path(), {}, config.vocab_size, 0, config.seq_len, (), (), digest, "python prepare.py")
    return Bench(config, data, Lease((), device), Tier(False, 0), Path("cache"))


def test_the_first_night_is_named_for_today_and_later_ones_count_on(tmp_path: Path) -> None:
    assert choose_tag(tmp_path, None) == TODAY
    for wanted in (TODAY, TODAY + "b", TODAY + "c"):
        assert choose_tag(tmp_path, None) == wanted
        begun(tmp_path, wanted, "claim", "stop")


def test_a_day_has_26_names(tmp_path: Path) -> None:
    for letter in ("", *"bcdefghijklmnopqrstuvwxyz"):
        begun(tmp_path, TODAY + letter, "claim", "stop")
    with pytest.raises(Stop, match=f"{TODAY} to {TODAY}z are all taken; --tag NAME"):
        choose_tag(tmp_path, None)


def test_without_a_tag_the_newest_unfinished_night_goes_on(tmp_path: Path) -> None:
    begun(tmp_path, "older", "stop")
    begun(tmp_path, "old", "claim")  # claimed, and killed before it was published
    begun(tmp_path, "new", "claim", "stop")
    assert choose_tag(tmp_path, None) == "old"
    assert choose_tag(tmp_path, "older") == "older"
    assert choose_tag(tmp_path, "fresh") == "fresh"


def test_a_night_that_is_over_or_was_run_elsewhere_is_not_taken_up(tmp_path: Path) -> None:
    begun(tmp_path, "new", "claim", "stop")
    begun(tmp_path, "old", home="experiments")
    for tag, why in (("new", "is over"), ("old", "was begun in another checkout")):
        with pytest.raises(Stop, match=f"night {tag} {why}.*--tag NAME") as stopped:
            choose_tag(tmp_path, tag)
        assert stopped.value.code == 2
    assert choose_tag(tmp_path, None) == TODAY


@pytest.mark.parametrize("tag", ["", "-x", ".x", "a/b", "a b", "..", "a..b", "a.lock", "a.", "x~1", "a\n"])
def test_a_tag_that_cannot_name_a_branch_is_wrong_usage(tmp_path: Path, tag: str) -> None:
    with pytest.raises(Stop, match="a tag is made of") as stopped:
        choose_tag(tmp_path, tag)
    assert stopped.value.code == 2


def test_a_night_begins_with_what_earlier_ones_on_the_same_machine_know(tmp_path: Path) -> None:
    root = repositories.root(tmp_path)
    for tag, digest, profile, scores in [("n1", "d1", "demo", (1.0, 1.002)), ("n2", "d2", "demo", (1.0, 2.0)),
                                         ("n3", "d1", "single", (1.0, 3.0))]:
        book = Ledger(Journal(root / ".nightshift" / tag / "journal.jsonl"))
        config = demo(baselines=2, sigma0=0.003) if profile == "demo" else None
        branch = Branch(root, tag)
        git(root, "switch", "-q", "main")
        held = bench(config or Config(**{**demo(baselines=2).as_dict(), "profile": profile}), digest)
        take_up(root, tag, book, branch, held)
        for bpb in scores:
            play(book, scored(bpb))
    git(root, "switch", "-q", "main")
    book = Ledger(Journal(root / ".nightshift" / "n4" / "journal.jsonl"))
    take_up(root, "n4", book, Branch(root, "n4"), bench(demo(baselines=2, sigma0=0.003)))
    night = book.state.night
    assert night["prior"] == {"ss": pytest.approx(2 * 0.001**2), "df": 1}
    assert night["sigma0"] == pytest.approx(((4 * 0.003**2 + 2 * 0.001**2) / 5) ** 0.5)
    assert decide.next(book.state, 0.0).kind == "baseline"
    assert (book.state.leg["pid"], book.state.tip) == (os.getpid(), night["base"])
    assert night["blob"] == git(root, "rev-parse", "HEAD:train.py")


@pytest.mark.parametrize(("what", "change"), [
    ("data_digest", {"digest": "d2"}), ("device", {"device": "another CPU"}), ("budget_s", {"budget_s": 9.0}),
])  # fmt: skip
def test_a_night_goes_on_only_under_what_it_began_under(tmp_path: Path, what: str, change: dict[str, object]) -> None:
    root = repositories.root(tmp_path)
    path = root / ".nightshift" / "nov20" / "journal.jsonl"
    book = Ledger(Journal(path))
    take_up(root, "nov20", book, Branch(root, "nov20"), bench(demo()))
    seed = book.state.night["seed"]
    again = Ledger(Journal(path))
    take_up(root, "nov20", again, Branch(root, "nov20"), bench(demo(max_experiments=9)))
    assert again.state.night["seed"] == seed and again.state.leg["limits"]["max_experiments"] == 9
    before = path.read_bytes()
    other = bench(demo(budget_s=9.0)) if what == "budget_s" else bench(demo(), **change)  # type: ignore[arg-type]
    with pytest.raises(Stop, match=rf"night nov20 cannot go on: {what} was .*, is .*--tag NAME"):
        take_up(root, "nov20", Ledger(Journal(path)), Branch(root, "nov20"), other)
    assert path.read_bytes() == before
    assert len(ledger.nights(root)) == 1
