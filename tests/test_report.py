"""The report says what may be said, shows every run, is one file, and lets no proposer's text act on the page."""

from __future__ import annotations

import re
import shutil
import struct
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import nights
import pytest
import repositories
from hypothesis import given
from hypothesis import strategies as st
from nights import BAD, CRASH, GOOD, REFUSED, Idea

from nightshift import ledger, plots
from nightshift.journal import parse
from nightshift.ledger import State
from nightshift.report import Night, escaped, report, seconds_at_work, verdict
from nightshift.values import Belief

isolated = pytest.fixture(autouse=True)(repositories.isolated)
TITLE = '$\\frac{</title><svg onload="alert(3)">\x1b[31m\u202e 猫'
NASTY = Idea(TITLE, 9, "x9 = '</pre><script>alert(4)</script>'", -0.02)
AWFUL = Idea("an awful idea", 11, "x11 = 1111", +40.0)


class Page(HTMLParser):
    """The tags that a browser would see, and their attributes, and that they are closed in order."""

    VOID = ("meta", "img", "input", "source", "line", "circle")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A night with everything in it that can happen."""
    with pytest.MonkeyPatch.context() as patch:
        repositories.isolated(tmp_path_factory, patch)
        root = repositories.make(tmp_path_factory.mktemp("whole"))
        (root / "program.md").write_text("Try things.\n")
        nights.play(root, [GOOD, BAD, CRASH, REFUSED, NASTY, AWFUL], claim_per_arm=4, sentinel_every=3)
    return root


@pytest.fixture(scope="module")
def page(whole: Path) -> str:
    """Its report."""
    assert report(whole) == 0
    return (whole / "report.html").read_text()


def night_of(root: Path, tag: str = "nov20", **claim: Any) -> Night:
    """The night in `root`, its claim replaced where one is given."""
    path = ledger.journals(root)[tag]
    events = parse(path.read_bytes())[0]
    state = ledger.fold(events)
    if claim:
        state.claim = claim
    return Night(root, events, state)


# The page


def test_the_verdict_comes_first_and_is_the_claim(whole: Path, page: str) -> None:
    claim = night_of(whole).state.claim
    assert claim is not None and claim["verdict"] == "better"
    told = re.search(r'<p class="verdict good">(.*?)</p>', page)
    assert told and "is better than its first: " in told[1] and "4 fresh runs an arm" in told[1]
    for name in ("delta", "low", "high"):
        assert f"{claim['test'][name]:+.4f}".replace("-", "−") in told[1]
    assert page.index('class="verdict') < page.index("<picture>") < page.index("<details")


def test_every_run_is_there_with_its_figures(whole: Path, page: str) -> None:
    shown = Page(page)
    state = night_of(whole).state
    assert shown.tags.count("details") == len(state.rows)
    for row in state.rows:
        assert row.commit[:10] in shown.text and str(row.seed) in shown.text
        for split in row.scores.values():
            assert f"{split.bpb:.6f}" in shown.text
    assert "ended before run.finish()" in shown.text and "no such lines" in shown.text


def test_diffs_are_shown_line_by_line(page: str) -> None:
    assert '<span class="del">-x3 = 3</span><span class="add">+x3 = 33</span>' in page
    assert "--- a/train.py" not in page


def test_one_file_that_asks_for_nothing(page: str) -> None:
    shown = Page(page)
    assert not {"script", "link", "iframe", "object"} & {*shown.tags}
    for name, value in shown.attributes:
        assert not name.startswith("on")
        if name in ("src", "srcset", "href"):
            assert value and value.startswith("data:image/png;base64,")
    assert "default-src 'none'" in page and "url(" not in page and "@import" not in page


def test_what_a_proposer_wrote_is_shown_and_never_acts(page: str) -> None:
    shown = Page(page)
    assert "<script>alert(1)</script>" in shown.text  # a hypothesis
    assert "<img src=x onerror=alert(2)>" in shown.text  # a log
    assert '</title><svg onload="alert(3)">[31m 猫' in shown.text  # a title, less what a terminal would obey
    assert "</pre><script>alert(4)</script>" in shown.text  # a diff
    assert shown.tags.count("svg") == 1 and shown.tags.count("title") == 1


@given(st.text(max_size=40))
def test_escaped_text_holds_no_markup_and_loses_nothing_visible(text: str) -> None:
    safe = escaped(text)
    assert not set(safe) & set("<>\"'") and not re.search("[\x00-\x08\u202a-\u202e\ud800-\udfff]", safe)
    safe.encode()
    plain = re.sub("\x1b\\[[0-9;]*m", "", text)
    if plain.isascii() and plain.isprintable():
        parser = Page(f"<p>{safe}</p>")
        assert parser.text == plain


def test_a_night_still_going_shows_what_is_not_published(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = repositories.make(tmp_path / "repo")
    (root / "program.md").write_text("Try things.\n")
    nights.play(root, [GOOD, CRASH, BAD], runs=5)
    assert report(root) == 0 and "claims nothing yet" in capsys.readouterr().out
    text = (root / "report.html").read_text()
    assert '<span class="add">+x3 = 33</span>' in text and "step 2 loss 5.1" in text
    shutil.rmtree(root / ".git")
    assert report(root) == 0 and "Neither published nor in this clone" in (root / "report.html").read_text()


def test_the_newest_night_or_the_one_that_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report(tmp_path) == 1 and "python loop.py run" in capsys.readouterr().out
    root = repositories.make(tmp_path / "repo")
    (root / "program.md").write_text("Try things.\n")
    for tag in ("zebra", "alpha"):
        nights.play(root, [], tag=tag, runs=1)
    assert report(root) == 0 and "<h1>night alpha</h1>" in (root / "report.html").read_text()
    assert report(root, "zebra") == 0 and "<h1>night zebra</h1>" in (root / "report.html").read_text()
    capsys.readouterr()
    assert report(root, "lion") == 1 and "there are: zebra, alpha" in capsys.readouterr().out


# The verdict


INTERVAL = {"delta": -0.02, "low": -0.03, "high": -0.01, "first": 3.0, "final": 2.98}


@pytest.mark.parametrize(("claim", "sentence"), [
    ({"verdict": "better", "test": INTERVAL}, "final train.py is better than its first: −0.0200 bits per byte"),
    ({"verdict": "worse", "test": INTERVAL | {"delta": 0.02, "high": 0.03}}, "is worse than its first: +0.0200"),
    ({"verdict": "no difference shown", "test": INTERVAL | {"high": 0.01}}, "No difference is shown"),
    ({"verdict": "no difference shown", "test": INTERVAL}, "not shown to reach a loss of 3.28, so no gain is claimed"),
    ({"verdict": "too short to claim: fewer than 4 runs an arm"}, "Too short to claim: "),
])
def test_the_verdict_in_a_sentence(whole: Path, claim: dict[str, Any], sentence: str) -> None:
    assert sentence in verdict(night_of(whole, per_arm=8, **claim))


def test_no_keep_no_claim(tmp_path: Path) -> None:
    root = repositories.make(tmp_path / "repo")
    (root / "program.md").write_text("Try things.\n")
    nights.play(root, [BAD], claim_per_arm=4)
    assert verdict(night_of(root)).startswith("No keep, no claim: 1 candidate,")


def test_seconds_count_and_bits_do_not_in_a_night_to_a_target(whole: Path) -> None:
    night = night_of(whole, per_arm=8, verdict="better", test=INTERVAL | {"delta": -2.5, "low": -3.25, "high": -1.75})
    night.state.rules["objective"] = "time_to_target"
    assert "−2.50 seconds at equal loss on the sealed test split (95% interval −3.25 to −1.75" in verdict(night)


def test_time_at_work_leaves_out_the_pauses_between_legs() -> None:
    events = [("leg", 10), ("start", 12), ("leg", 100), ("stop", 105), ("leg", 200), ("decide", 207)]
    assert seconds_at_work({"event": name, "at": float(at)} for name, at in events) == 2 + 5 + 7
    assert seconds_at_work([]) == 0


# The picture


def size_of(png: bytes) -> tuple[int, int]:
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", png[16:24])
    return width, height


def test_the_picture_is_drawn_light_and_dark(whole: Path, page: str) -> None:
    light = (whole / "progress.png").read_bytes()
    night = night_of(whole)
    dark = plots.progress(night.state, plots.steps(night.events), "Said.", dark=True)
    assert size_of(light) == size_of(dark) == (1800, 960) and light != dark


def test_a_night_without_a_score_has_a_picture_too(whole: Path) -> None:
    night = night_of(whole)
    empty = replace(night.state, rows=[], stack=night.state.stack[:1])
    assert size_of(plots.progress(empty, [], "Nothing yet.")) == (1800, 960)


def test_the_steps_are_the_beliefs_of_the_journal(whole: Path) -> None:
    night = night_of(whole)
    path = plots.steps(night.events)
    told = {e["number"]: e["belief"]["m"] for e in night.events if e["event"] == "decide" and e["belief"]}
    assert {step.number: step.belief.m for step in path} == told
    assert all(0 < step.sigma < 0.1 for step in path)


def test_one_terrible_run_does_not_squash_the_picture() -> None:
    path = [plots.Step(n, Belief(3.0 - n / 1000, 1e-6), 0.003) for n in range(1, 9)]
    scores = [3.0, 2.99, 43.0, -20.0]
    low, high = plots.limits(scores, path)
    assert 2.95 < low < 2.99 and 3.0 < high < 3.05
    assert plots.limits([], []) == (0.0, 1.0) and plots.limits([2.0, 4.0], []) == (2.0, 4.0)


def test_kinds_are_told_apart(whole: Path) -> None:
    state: State = night_of(whole).state
    names = {plots.mark_of(row) for row in state.rows if row.status in ledger.RAN}
    assert names == {"baseline", "kept", "discarded", "sentinel", "claim run, first", "claim run, final"}
    kept = next(row for row in state.rows if plots.mark_of(row) == "kept")
    assert plots.mark_of(replace(kept, status="discard", taken_back_by=9)) == "taken back"
    assert plots.mark_of(replace(kept, counts=False)) == "did not count"
    assert len({(mark.shape, mark.filled) for mark in plots.MARKS.values()}) >= len(plots.MARKS) - 1


@given(
    dots=st.lists(st.tuples(st.floats(0, 800), st.floats(0, 400)), max_size=12),
    widths=st.lists(st.floats(20, 300), min_size=1, max_size=12),
)
def test_labels_cover_nothing(dots: list[tuple[float, float]], widths: list[float]) -> None:
    taken = [(x - 5, y - 5, x + 5, y + 5) for x, y in dots]
    for dot, width in zip(dots, widths, strict=False):
        place = plots._free_place(dot, width, 12.0, taken, (0.0, 0.0, 800.0, 400.0))
        if place is not None:
            box, leader = place
            assert box[0] >= 0 and box[2] <= 800 and box[1] >= 0 and box[3] <= 400
            for other in taken:
                assert box[2] <= other[0] or other[2] <= box[0] or box[3] <= other[1] or other[3] <= box[1]
            taken += [box, leader]
